"""LPIPS: the package's own figures for each net, and where its weights are looked for."""

from __future__ import annotations

import pickle
import socket
import urllib.error
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from xattn_video_eval.compare.metrics.psnr_ssim import LPIPS_NETS, Lpips, LpipsUnavailable, video_lpips

FILES = {"alex": "alexnet-owt-7be5be79.pth", "vgg": "vgg16-397923af.pth", "squeeze": "squeezenet1_1-b8a52dc0.pth"}
SMALLEST = {"alex": 31, "vgg": 16, "squeeze": 17}


def frames(height: int = 64, width: int = 80, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A smooth picture and a noisy copy of it."""
    y, x = np.mgrid[:height, :width]
    picture = np.stack([60 + x, 70 + y, 90 + (x + y) / 2], axis=-1)
    noisy = np.clip(picture + np.random.default_rng(seed).normal(0, 9, picture.shape), 0, 255)
    return picture.astype(np.uint8), noisy.astype(np.uint8)


@pytest.fixture(scope="module")
def networks() -> dict[str, torch.nn.Module]:
    """The real networks with the real heads; only the backbones' weights are random (they are not shipped)."""
    from xattn_video.integrations.torchvision_ops import repair_torchvision

    repair_torchvision()
    import lpips

    built = {}
    with warnings.catch_warnings():
        # lpips asks torchvision for its network in the older spelling.
        warnings.simplefilter("ignore", UserWarning)
        for net in LPIPS_NETS:
            torch.manual_seed(0)
            built[net] = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    return built


def checkpoint(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The backbone's weights under torchvision's names, beside a classifier that LPIPS has no use for."""
    state = {f"features.{name.split('.', 1)[1]}": value for name, value in network.net.state_dict().items()}
    return {**state, "classifier.1.weight": torch.zeros(3)}


@pytest.mark.parametrize("net", LPIPS_NETS)
def test_equals_the_package_called_directly(networks: dict[str, torch.nn.Module], net: str) -> None:
    import lpips

    reference, test = frames()
    distance = Lpips("cpu", net, network=networks[net])
    with torch.no_grad():
        expected = networks[net](lpips.im2tensor(reference), lpips.im2tensor(test)).item()
    assert expected > 1e-6
    assert distance(reference, test) == pytest.approx(expected, rel=1e-5)
    assert distance(test, reference) == pytest.approx(expected, rel=1e-5)
    assert distance(reference, reference) == 0.0
    unit = reference.astype(np.float32) / 255, test.astype(np.float32) / 255
    assert distance(*unit) == pytest.approx(expected, rel=1e-3)


def test_a_video_is_the_mean_over_its_frames(networks: dict[str, torch.nn.Module]) -> None:
    distance = Lpips("cpu", "squeeze", network=networks["squeeze"])
    reference, test = frames()
    videos = np.stack([reference, reference, test]), np.stack([test, reference, frames(seed=1)[1]])
    expected = (distance(reference, test) + distance(test, frames(seed=1)[1])) / 3
    assert distance(*videos) == pytest.approx(expected)
    assert video_lpips(*videos, distance) == distance(*videos)
    with pytest.raises(ValueError, match=r"reference must be an RGB video \[T, H, W, 3\]"):
        video_lpips(reference, test, distance)
    with pytest.raises(ValueError, match="same number of frames, at least one, got 3 and 2"):
        distance(videos[0], videos[1][:2])


@pytest.mark.parametrize("net", LPIPS_NETS)
def test_smallest_frames(networks: dict[str, torch.nn.Module], net: str) -> None:
    distance = Lpips("cpu", net, network=networks[net])
    side = SMALLEST[net]
    frame = np.zeros((side, side, 3), np.uint8)
    assert distance(frame, frame) == 0.0
    with pytest.raises(ValueError, match=rf"LPIPS \({net}\) needs frames of at least {side} x {side}, got {side} x"):
        distance(frame[:-1], frame[:-1])
    # The limit is the network's own: one pixel less and it fails.
    small = torch.zeros(1, 3, side - 1, side)
    with pytest.raises(RuntimeError, match="too small"):
        networks[net](small, small)
    with pytest.raises(ValueError, match="same shape"):
        distance(frame, np.zeros((side, side + 1, 3), np.uint8))


def test_bad_arguments(networks: dict[str, torch.nn.Module], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="net must be one of alex, vgg, squeeze, got 'resnet'"):
        Lpips("cpu", "resnet")
    with pytest.raises(ValueError, match="weights must be None where a network is given"):
        Lpips("cpu", weights=tmp_path, network=networks["alex"])


@pytest.mark.parametrize("net", LPIPS_NETS)
def test_weights_of_a_given_folder(networks: dict[str, torch.nn.Module], net: str, tmp_path: Path) -> None:
    torch.save(checkpoint(networks[net]), tmp_path / FILES[net])
    state = torch.get_rng_state()
    loaded = Lpips("cpu", net, tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert loaded(*frames()) == Lpips("cpu", net, network=networks[net])(*frames())


def test_weights_of_the_cache_need_no_network(
    networks: dict[str, torch.nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def online(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("must not go online")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", online)
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    torch.save(checkpoint(networks["squeeze"]), cache / FILES["squeeze"])
    expected = Lpips("cpu", "squeeze", network=networks["squeeze"])(*frames())
    assert Lpips("cpu", "squeeze")(*frames()) == expected


def test_a_damaged_file_in_the_cache_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    (cache / FILES["squeeze"]).write_bytes(b"half a download")
    with pytest.raises(LpipsUnavailable, match=f"{cache / FILES['squeeze']} is damaged or not a checkpoint"):
        Lpips("cpu", "squeeze")


def test_without_weights_says_what_was_looked_for_and_where(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def offline(*args: Any, **kwargs: Any) -> None:
        assert socket.getdefaulttimeout() is not None
        raise urllib.error.URLError("name resolution\nfailed")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", offline)
    before = socket.getdefaulttimeout()
    for net in LPIPS_NETS:
        with pytest.raises(LpipsUnavailable, match="neither in torch hub's cache nor can they be downloaded") as caught:
            Lpips("cpu", net)
        message = str(caught.value)
        assert f"no {tmp_path / 'hub' / 'checkpoints' / FILES[net]}, and" in message
        assert "name resolution failed" in message
        assert "--lpips-weights FOLDER" in message
        assert "\n" not in message
    assert socket.getdefaulttimeout() == before


def test_the_download_says_nothing_on_stdout(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def offline(*args: Any, **kwargs: Any) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", offline)
    with pytest.raises(LpipsUnavailable):
        Lpips("cpu", "squeeze")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert FILES["squeeze"] in captured.err


def test_a_given_folder_is_the_only_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def online(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("must not go online")

    monkeypatch.setattr("torch.hub.urlopen", online)
    with pytest.raises(LpipsUnavailable, match=f"no {FILES['vgg']} in {tmp_path}"):
        Lpips("cpu", "vgg", tmp_path)
    with pytest.raises(LpipsUnavailable, match=f"no {FILES['alex']} in .*nowhere"):
        Lpips("cpu", weights=tmp_path / "nowhere")


class Spoiled:
    """Unpickling one of these would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_files_that_are_no_checkpoint(networks: dict[str, torch.nn.Module], tmp_path: Path) -> None:
    file = tmp_path / FILES["squeeze"]
    trace = tmp_path / "trace"
    for content in (b"", b"<html>404</html>", pickle.dumps({"features.0.weight": Spoiled(trace)}, protocol=2)):
        file.write_bytes(content)
        with pytest.raises(LpipsUnavailable, match="is damaged or not a checkpoint") as caught:
            Lpips("cpu", "squeeze", tmp_path)
        assert str(file) in str(caught.value)
        assert "\n" not in str(caught.value)
    torch.save({"features.0.weight": Spoiled(trace)}, file)
    with pytest.raises(LpipsUnavailable, match="is damaged or not a checkpoint"):
        Lpips("cpu", "squeeze", tmp_path)
    assert not trace.exists()
    # Another network's weights, under this one's name; a checkpoint that is no dictionary.
    for content in (checkpoint(networks["alex"]), {}, torch.zeros(3)):
        torch.save(content, file)
        with pytest.raises(LpipsUnavailable, match=r"does not hold SqueezeNet 1\.1's weights") as caught:
            Lpips("cpu", "squeeze", tmp_path)
        assert "\n" not in str(caught.value)
