"""LPIPS, the learned perceptual distance: its three networks, and where their weights come from."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from xattn_video.extras import require
from xattn_video_eval.compare.metrics.frames import check_frames, each_frame, is_video

if TYPE_CHECKING:
    import torch

_DOWNLOAD_TIMEOUT_S = 20.0


@dataclass(frozen=True)
class _Net:
    """A backbone: its name in messages, torchvision's checkpoint, and the smallest side that its layers take."""

    title: str
    url: str
    megabytes: int
    smallest: int

    @property
    def file_name(self) -> str:
        return self.url.rsplit("/", 1)[1]


_HUB = "https://download.pytorch.org/models/"
_NETS = {
    "alex": _Net("AlexNet", f"{_HUB}alexnet-owt-7be5be79.pth", 233, 31),
    "vgg": _Net("VGG16", f"{_HUB}vgg16-397923af.pth", 528, 16),
    "squeeze": _Net("SqueezeNet 1.1", f"{_HUB}squeezenet1_1-b8a52dc0.pth", 5, 17),
}
LPIPS_NETS = tuple(_NETS)


class LpipsUnavailable(RuntimeError):
    """LPIPS cannot be computed here; the message is the reason, on one line."""


class Lpips:
    """Learned perceptual distance (Zhang et al. 2018): 0 is identical, larger is further.

    The `lpips` package's version 0.1 linear heads, which it ships, on a backbone of torchvision's ImageNet
    weights. `alex` (233 MB) is what most papers report; `vgg` (528 MB) and `squeeze` (5 MB) give other figures,
    so only distances of one net compare. The weights come from `weights`, or from torch hub's cache, into
    which they are downloaded once where there is a network. On the CPU a pair of 720p frames takes the whole
    process to 0.8 GB with alex, 1.2 GB with squeeze and 2.9 GB with vgg.

    Example:
        >>> distance = Lpips()                          # doctest: +SKIP
        >>> distance(reference_frame, test_frame)       # doctest: +SKIP
        0.031

    Args:
        device: where to compute.
        net: "alex", "vgg" or "squeeze".
        weights: a folder that holds torchvision's checkpoint under its published name
            (`alexnet-owt-7be5be79.pth`, `vgg16-397923af.pth`, `squeezenet1_1-b8a52dc0.pth`); nothing is
            downloaded then.
        network: an `lpips.LPIPS` of this `net` to use instead of loading one.

    Raises:
        ValueError: an unknown `net`, or `weights` beside `network`.
        LpipsUnavailable: the package or its weights cannot be loaded; the message says why.
    """

    def __init__(
        self,
        device: str | torch.device = "cpu",
        net: str = "alex",
        weights: str | os.PathLike[str] | None = None,
        *,
        network: torch.nn.Module | None = None,
    ) -> None:
        if net not in _NETS:
            raise ValueError(f"net must be one of {', '.join(LPIPS_NETS)}, got {net!r}")
        if network is not None and weights is not None:
            raise ValueError(f"weights must be None where a network is given, got {weights}")
        import torch

        self.net = net
        self.device = torch.device(device)
        self._network = (network if network is not None else _load_lpips(net, weights)).to(self.device).eval()

    def __call__(self, reference: np.ndarray, test: np.ndarray) -> float:
        """Distance of two frames `[H, W, 3]`, or the mean over the frames of two videos `[T, H, W, 3]`.

        A video goes through the network frame by frame, so its length costs no memory.

        Raises:
            ValueError: as `psnr_ssim.psnr`, or frames smaller than the net takes: a side of 31 pixels for
                alex, 16 for vgg, 17 for squeeze.
        """
        import torch

        if is_video(reference, test):
            return float(np.mean(each_frame(self, reference, test)))
        data_range = check_frames(reference, test)
        smallest = _NETS[self.net].smallest
        if min(reference.shape[:2]) < smallest:
            height, width = reference.shape[:2]
            raise ValueError(
                f"LPIPS ({self.net}) needs frames of at least {smallest} x {smallest}, got {width} x {height}"
            )
        with torch.inference_mode():
            first, second = (self._to_input(frame, data_range) for frame in (reference, test))
            return float(self._network(first, second).item())

    def _to_input(self, frame: np.ndarray, data_range: float) -> torch.Tensor:
        """`[H, W, 3]` in [0, data_range] to float32 `[1, 3, H, W]` in [-1, 1]."""
        import torch

        pixels = torch.from_numpy(np.ascontiguousarray(frame)).to(self.device)
        return (pixels.permute(2, 0, 1).unsqueeze(0).float() / data_range) * 2.0 - 1.0


def _load_lpips(net: str, weights: str | os.PathLike[str] | None) -> torch.nn.Module:
    """The network with its backbone's weights. Raises LpipsUnavailable."""
    from xattn_video.integrations import repair_torchvision

    try:
        require("LPIPS", "lpips")
        repair_torchvision()
        import lpips
    # A torch, torchvision and lpips that do not fit each other fail in many ways, and each leaves LPIPS out.
    except Exception as error:
        raise LpipsUnavailable(f"the lpips package cannot be imported: {_one_line(error)}") from error
    # Before the network is built, which takes seconds.
    state = _backbone_state(net, weights)
    import torch

    # Its backbone starts from random numbers, which must not move the caller's.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # lpips asks torchvision for its network in the older spelling.
        warnings.filterwarnings("ignore", message=".*'pretrained'.*", category=UserWarning)
        warnings.filterwarnings("ignore", message=".*weight enum.*", category=UserWarning)
        network: Any = lpips.LPIPS(net=net, version="0.1", pnet_rand=True, verbose=False)
    try:
        if not isinstance(state, dict):
            raise TypeError(f"a {type(state).__name__} instead of named tensors")
        # lpips cuts torchvision's `features` into slices and keeps their numbers: slice2.3.weight is features.3.weight.
        network.net.load_state_dict({name: state[_torchvision_name(name)] for name in network.net.state_dict()})
    except (KeyError, TypeError, RuntimeError) as error:
        folder = _cache() if weights is None else weights
        file = Path(folder) / _NETS[net].file_name
        raise LpipsUnavailable(f"{file} does not hold {_NETS[net].title}'s weights: {_one_line(error)}") from error
    module: torch.nn.Module = network
    return module


def _torchvision_name(name: str) -> str:
    return f"features.{name.split('.', 1)[1]}"


def _backbone_state(net: str, weights: str | os.PathLike[str] | None) -> Any:
    """torchvision's checkpoint of `net`, from the given folder, the cache or the network."""
    import torch

    wanted = _NETS[net]
    file = (_cache() if weights is None else Path(weights)) / wanted.file_name
    if file.is_file():
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        # A damaged or foreign file fails in as many ways as there are formats.
        except Exception as error:
            raise LpipsUnavailable(f"{file} is damaged or not a checkpoint: {_one_line(error)}") from error
    if weights is not None:
        raise LpipsUnavailable(
            f"{wanted.title}'s weights are not there: no {wanted.file_name} in {os.fspath(weights)}, the folder of "
            f"weights that was given"
        )
    try:
        # torch hub announces its download on stdout, which belongs to results.
        with _network_timeout(_DOWNLOAD_TIMEOUT_S), contextlib.redirect_stdout(sys.stderr):
            return torch.hub.load_state_dict_from_url(
                wanted.url, map_location="cpu", check_hash=True, weights_only=True
            )
    # Anything that stops the download (no network, no space, a proxy's own page) means the same to the caller.
    except Exception as error:
        raise LpipsUnavailable(
            f"{wanted.title}'s weights are neither in torch hub's cache nor can they be downloaded: no {file}, and "
            f"{wanted.url} ({wanted.megabytes} MB) gave {_one_line(error)}; fetch that file elsewhere and name its "
            "folder (--lpips-weights FOLDER)"
        ) from error


def _cache() -> Path:
    import torch

    return Path(torch.hub.get_dir()) / "checkpoints"


@contextlib.contextmanager
def _network_timeout(seconds: float) -> Iterator[None]:
    """torch hub sets no timeout of its own: behind a silent firewall it would wait for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
