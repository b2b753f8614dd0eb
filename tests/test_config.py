"""XAttnConfig: bad settings are refused by name, good ones survive a round trip."""

from __future__ import annotations

import dataclasses
import json

import pytest

from xattn_video import XAttnConfig
from xattn_video.config import MODEL_PRESETS, PRESETS, Settings


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"stride": 0}, "stride must be a power of two, got 0"),
        ({"stride": 12}, "stride must be a power of two, got 12"),
        ({"block_size": 100}, "block_size must be a power of two, got 100"),
        ({"stride": 256}, "stride must divide block_size"),
        ({"threshold": 0.0}, r"threshold must be in \(0, 1\], got 0.0"),
        ({"threshold": 1.5}, r"threshold must be in \(0, 1\], got 1.5"),
        ({"threshold": 90}, r"threshold must be in \(0, 1\], got 90; 0\.9, not 90\?"),
        ({"threshold": (0.9, 45.0)}, r"got 45\.0; 0\.45, not 45\?"),
        ({"threshold": float("nan")}, r"threshold must be in \(0, 1\], got nan"),
        ({"threshold": (0.9, -1.0)}, "threshold"),
        ({"threshold": ()}, "at least one"),
        ({"warmup_steps": -1}, "warmup_steps must be 0 or more"),
        ({"min_tokens": -1}, "min_tokens must be 0 or more"),
        ({"dense_last": -1}, "dense_last must be 0 or more"),
        ({"selection": "best"}, "selection must be one of"),
        ({"selection": "top_k"}, "top_k"),
        ({"top_k": 3}, "top_k"),
        ({"selection": "top_k", "top_k": 0}, "top_k must be 1 or more"),
        ({"selection": "top_ratio", "top_ratio": 20}, r"got 20; 0\.2, not 20\?"),
        ({"selection": "top_ratio", "top_ratio": 1.5}, "top_ratio must be in"),
        ({"backend": "cuda"}, "backend must be one of"),
        ({"max_extra_mib": 0}, "max_extra_mib must be 1 or more, got 0"),
        ({"anchors": -1}, "anchors must be 0 or more, got -1"),
        ({"last_steps": -1}, "last_steps must be 0 or more, got -1"),
        ({"keep_masks": 0}, "keep_masks must be 1 or more, got 0"),
        ({"warmup": 1.0}, "warmup must be between 0 and 1"),
        ({"warmup": 25}, r"got 25; 0\.25, not 25\?"),
        ({"warmup": float("nan")}, "warmup must be between 0 and 1"),
        ({"threshold_ramp": 1.5}, "threshold_ramp must be from -1 to 1, got 1.5"),
        ({"threshold_ramp": 30}, r"got 30; 0\.3, not 30\?"),
        ({"threshold_ramp": float("nan")}, "threshold_ramp must be from -1 to 1, got nan"),
        ({"residual": "int8"}, "residual must be one of off, int4, fp8, full, got 'int8'"),
        ({"residual": "int4", "refresh": "often"}, "refresh must be one of growing, fixed or a sequence"),
        ({"residual": "int4", "refresh": ()}, "refresh must hold sparse steps in rising order"),
        ({"residual": "int4", "refresh": (3, 1)}, "refresh must hold sparse steps in rising order"),
        ({"residual": "int4", "refresh": (-1, 1)}, "refresh must hold sparse steps in rising order"),
        ({"residual": "int4", "refresh": "fixed"}, "needs refresh_every"),
        ({"residual": "int4", "refresh_every": 0}, "refresh_every must be a number of steps from 1 or a share"),
        ({"residual": "int4", "refresh_every": 2.0}, "refresh_every must be a number of steps from 1 or a share"),
        ({"residual": "int4", "residual_mib": 0}, "residual_mib must be 1 or more, got 0"),
        ({"residual": "int4", "refresh": (0, 1), "refresh_every": 2}, "refresh_every goes without a list of steps"),
        ({"residual": "int4", "keep_masks": 2}, "keep_masks goes without a residual"),
        ({"residual": "int4", "threshold_ramp": 0.3}, "threshold_ramp goes without a residual"),
        ({"selection": "top_k", "top_k": 2, "threshold_ramp": 0.3}, "threshold_ramp goes with selection 'threshold'"),
        ({"refresh_every": 4}, "refresh_every goes with a residual"),
        ({"refresh": "growing"}, "refresh goes with a residual"),
        ({"extrapolate": True}, "extrapolate goes with a residual"),
        ({"residual_mib": 100}, "residual_mib goes with a residual"),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(settings, words):
    with pytest.raises(ValueError, match=words):
        XAttnConfig(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"stride": 8.0},
        {"stride": True},
        {"max_extra_mib": 0.5},
        {"threshold": "0.9"},
        {"dense_layers": "blocks.0"},
        {"warmup": "0.25"},
        {"threshold_ramp": True},
        {"anchors": 1.0},
        {"extrapolate": 1, "residual": "int4"},
        {"refresh_every": "4", "residual": "int4"},
        {"refresh": (0, 1.5), "residual": "int4"},
    ],
)
def test_a_setting_of_the_wrong_type_is_refused(settings):
    with pytest.raises(TypeError, match=next(iter(settings))):
        XAttnConfig(**settings)


@pytest.mark.parametrize(
    "config",
    [
        XAttnConfig(),
        XAttnConfig(threshold=(0.8, 0.95), dense_layers=(0, "blocks.1.*"), warmup_steps=0),
        XAttnConfig(selection="top_ratio", top_ratio=0.27, stride=16, block_size=64, backend="reference"),
        XAttnConfig(max_extra_mib=64),
        XAttnConfig(residual="int4", refresh=(0, 1, 3), extrapolate=True, anchors=1, warmup=0.25, last_steps=1),
        XAttnConfig(residual="fp8", refresh_every=4, residual_mib=100),
        XAttnConfig(threshold_ramp=0.3, keep_masks=4),
    ],
)
def test_settings_survive_json(config):
    assert XAttnConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_prompt_shows_the_settings_that_were_chosen():
    assert repr(XAttnConfig()) == "XAttnConfig(stride=8, threshold=0.9, warmup_steps=5)"
    config = XAttnConfig(stride=16, dense_layers=(0, "blocks.29.*"), warmup=0.25, residual="int4")
    assert eval(repr(config)) == config
    assert "min_tokens" not in repr(config)


def test_an_unknown_setting_in_a_file_is_refused():
    with pytest.raises(ValueError, match="unknown settings treshold"):
        XAttnConfig.from_dict({"treshold": 0.9})


def test_labels_tell_configurations_apart():
    assert XAttnConfig().label() == "xattn-s8-t0.90-w5"
    assert XAttnConfig(stride=16, threshold=0.95, warmup_steps=0).label() == "xattn-s16-t0.95-w0"
    others = [
        XAttnConfig(threshold=0.905),
        XAttnConfig(threshold=0.901),
        XAttnConfig(block_size=64),
        XAttnConfig(threshold=(0.9, 0.9)),
        XAttnConfig(threshold=(0.8, 1.0)),
        XAttnConfig(selection="top_k", top_k=8),
        XAttnConfig(selection="top_ratio", top_ratio=0.27),
        XAttnConfig(dense_layers=(0,)),
        XAttnConfig(min_tokens=64),
        XAttnConfig(dense_last=64),
        XAttnConfig(backend="reference"),
        XAttnConfig(max_extra_mib=64),
        XAttnConfig(anchors=1),
        XAttnConfig(last_steps=1),
        XAttnConfig(keep_masks=4),
        XAttnConfig(per_head=True),
        XAttnConfig(threshold_ramp=0.3),
        XAttnConfig(warmup=0.25),
        XAttnConfig(warmup=0.25, warmup_steps=3),
        XAttnConfig(residual="int4"),
        XAttnConfig(residual="fp8"),
        XAttnConfig(residual="int4", extrapolate=True),
        XAttnConfig(residual="int4", residual_mib=4),
        XAttnConfig(residual="int4", refresh_every=4),
        XAttnConfig(residual="int4", refresh_every=0.25),
        XAttnConfig(residual="int4", refresh="growing", refresh_every=4),
        XAttnConfig(residual="int4", refresh=(0, 1, 3)),
        XAttnConfig(residual="int4", refresh=(0, 1, 4)),
        XAttnConfig(),
    ]
    labels = [config.label() for config in others]
    assert len(set(labels)) == len(labels)
    assert not any(set(label) & set("/\\ :*") for label in labels)


@pytest.mark.parametrize(
    ("given", "anchors"),
    [
        ({"threshold": 0.89}, 1),
        ({"threshold": 0.02, "residual": "int4"}, 1),
        ({"threshold": 0.9}, 0),
        ({"threshold": 0.5, "anchors": 0}, 0),
        ({"threshold": 0.95, "anchors": 2}, 2),
        ({"threshold": (0.5, 0.7)}, 0),
        ({"selection": "top_ratio", "top_ratio": 0.2, "threshold": 0.5}, 0),
    ],
)
def test_a_video_model_has_anchors_below_a_threshold_of_09(given, anchors):
    config = XAttnConfig(**given)
    assert config.for_videos().anchors == anchors
    # A folder is named alike, whether the anchors were asked for or came with the threshold.
    assert config.label() == config.replace(anchors=anchors).label()
    assert ("-a" in config.label()) == bool(anchors)
    # Another threshold later brings its own.
    assert config.replace(threshold=0.9, selection="threshold", top_ratio=None).anchors == given.get("anchors")


def test_presets_of_model_families_are_the_papers_settings():
    assert XAttnConfig.preset("qwen2-vl").stride == 16
    assert XAttnConfig.preset("hunyuan-video", threshold=0.95).threshold == 0.95
    with pytest.raises(ValueError, match="preset must be one of"):
        XAttnConfig.preset("sora")
    with pytest.raises(ValueError, match="unknown settings taste"):
        XAttnConfig.preset("wan", taste=1)


def test_presets_for_videos_remember_and_differ_in_how_dense_they_are():
    fast, balanced, faithful = (XAttnConfig.preset(name) for name in ("fast", "balanced", "faithful"))
    for config in (fast, balanced, faithful):
        assert (config.residual, config.refresh, config.extrapolate, config.anchors) == ("int4", "growing", True, 1)
    assert fast.refresh_every > balanced.refresh_every
    assert faithful.threshold > balanced.threshold


def test_a_preset_without_its_residual_has_none_of_its_settings():
    assert XAttnConfig.preset("balanced", residual="off") == XAttnConfig(
        threshold=0.2, anchors=1, warmup_steps=4, warmup=0.25
    )
    with pytest.raises(ValueError, match="refresh_every goes with a residual"):
        XAttnConfig.preset("balanced", residual="off", refresh_every=0.1)
    # The steps that refresh are told one by one, so there is no largest gap between them.
    named = XAttnConfig.preset("fast", refresh=[1, 3])
    assert (named.refresh, named.refresh_every, named.extrapolate) == ((1, 3), None, True)
    with pytest.raises(ValueError, match="refresh_every goes without a list of steps"):
        XAttnConfig.preset("fast", refresh=(1, 3), refresh_every=2)


def test_models_of_the_command_line_have_the_preset_of_their_family():
    from xattn_video_pipelines.video.models import KNOWN_MODELS

    assert KNOWN_MODELS.keys() <= {*PRESETS, *MODEL_PRESETS}
    assert XAttnConfig.preset("wan2.2-a14b", threshold=0.95) == XAttnConfig.preset("wan", threshold=0.95)
    with pytest.raises(ValueError, match=r"faithful, .*hunyuan-video.* got ballanced \(did you mean balanced\?\)"):
        XAttnConfig.preset("ballanced")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"treshold": 0.9}, r"no setting treshold \(did you mean threshold\?\)"),
        ({"warm_up_steps": 3, "taste": 1}, r"no setting taste, warm_up_steps \(did you mean warmup_steps\?\)"),
    ],
)
def test_a_misspelled_setting_is_told_the_nearest_one(given, told):
    for make in (XAttnConfig, XAttnConfig().replace):
        with pytest.raises(TypeError, match=told):
            make(**given)


def test_the_settings_that_editors_complete_are_those_of_the_configuration():
    own = {field.name: field.type for field in dataclasses.fields(XAttnConfig)}
    assert {name: hint.__forward_arg__ for name, hint in Settings.__annotations__.items()} == own
