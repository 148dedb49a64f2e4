"""Official Text4Vis and BIKE configuration files, read as they are."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import yaml

from kineticlip.config import Config, load_config, read_config
from kineticlip.config.official import RULES, Translation, is_official, translate
from kineticlip.runtime.errors import UserError

# The keys and the layout of the released K400 files (paths are ours).
TEXT4VIS = """\
resume:
pretrain:
seed: 1024
data:
    dataset: k400
    modality: RGB
    num_segments: 16
    seg_length: 1
    batch_size: 16
    workers: 4
    num_classes: 400
    image_tmpl: 'img_{:05d}.jpg'
    train_root: '/data/train'
    train_list: 'lists/train.txt'
    val_root: /data/val
    val_list: lists/val.txt
    label_list: 'lists/kinetics_400_labels.csv'
    index_bias: 1
    input_size: 336
    randaug:
        N: 2 #2
        M: 9  #9
    random_shift: True
network:
    arch: ViT-L/14-336px  #ViT-B/32 ViT-B/16
    init: True
    tm: False  # False tsm tokent1d tokenshift
    drop_out: 0.0
    emb_dropout: 0.0
    type: clip_k400
    sim_header: Transf  # Transf   None
    joint_st: False
    drop: 0
    fix_text: True
    fix_video: False
solver:
    type: cosine
    epochs: 30
    start_epoch: 0
    epoch_offset: 0
    optim: adamw
    lr: 5.e-5
    lr_warmup_step: 5
    weight_decay: 0.2
    loss_type: CE
    evaluate: False
    clip_ratio: 0.1
    grad_accumulation_steps: 2
logging:
    print_freq: 10
    eval_freq: 5
"""
BIKE = (
    TEXT4VIS.replace("sim_header: Transf", "sim_header: None\n    interaction: VCS")
    .replace("loss_type: CE", "loss_type: NCE")
    .replace("random_shift: True", "random_shift: True\n    output_path: exps")
)


def document(text: str, *, processes: int = 1) -> Translation:
    return translate(yaml.safe_load(text), {}, "c.yaml", processes=processes)


def write(folder: Path, text: str) -> Path:
    path = folder / "official.yaml"
    path.write_text(text)
    return path


def test_a_released_file_becomes_a_whole_config(tmp_path: Path) -> None:
    config, notes = read_config(write(tmp_path, TEXT4VIS))
    assert config.name == "k400-text4vis-vit-l-14-336-f16"
    assert (config.method, config.seed) == ("text4vis", 1024)
    assert (config.model.arch, config.model.weights) == ("ViT-L-14-336", "openai")
    assert config.classifier.template == "a video of a person {}."
    assert (config.data.num_frames, config.data.resolution) == (16, 336)
    assert (config.data.train_list, config.data.val_root) == ("lists/train.txt", "/data/val")
    assert config.data.labels == "lists/kinetics_400_labels.csv"
    assert (config.data.augmentation, config.data.min_frames) == ("released", 8)
    assert (config.data.workers, config.data.shots) == (4, 0)
    assert (config.text4vis.header, config.text4vis.temporal_module) == ("transformer", "none")
    assert (config.optim.lr, config.optim.warmup_epochs) == (5e-5, 5)
    assert (config.optim.clip_ratio, config.optim.weight_decay) == (0.1, 0.2)
    assert config.optim.official_updates
    assert (config.train.epochs, config.train.eval_every) == (30, 5)
    assert (config.train.micro_batch_size, config.train.batch_size) == (16, 32)
    assert config.train.log_every == 5  # ten micro-batches are five steps of two
    ignored = [note for note in notes if "has no effect" in note]
    assert sorted(note.split("'")[1] for note in ignored) == [
        "data.index_bias", "data.num_classes", "data.randaug.M", "data.randaug.N",
        "data.seg_length", "network.drop", "network.fix_text", "network.fix_video",
        "network.type", "solver.epoch_offset", "solver.loss_type", "solver.optim",
    ]  # fmt: skip
    line = TEXT4VIS.splitlines().index("    index_bias: 1") + 1
    assert any(note.startswith(f"{tmp_path}/official.yaml:{line}: 'data.index_b") for note in notes)


def test_overrides_and_warnings_work_on_official_files(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    path = write(tmp_path, TEXT4VIS)
    config = load_config(path, ["optim.official_updates=false", "test.clips=4"])
    assert not config.optim.official_updates
    assert config.test.clips == 4
    _, notes = read_config(path)
    assert [record.message for record in caplog.records] == notes
    with pytest.raises(UserError, match=r"--set network\.arch=RN50: unknown key 'network'"):
        load_config(path, ["network.arch=RN50"])


def test_batch_sizes_count_every_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert document(TEXT4VIS, processes=8).values["train"]["batch_size"] == 256
    monkeypatch.setenv("WORLD_SIZE", "4")
    config, notes = read_config(write(tmp_path, TEXT4VIS))
    assert config.train.batch_size == 128
    assert any("16 clips x 2 accumulated x 4 processes = 128" in note for note in notes)


@pytest.mark.parametrize("value", ["None", "", "'None'", "~"])
def test_none_is_a_string_and_means_mean_pooling(tmp_path: Path, value: str) -> None:
    text = TEXT4VIS.replace("sim_header: Transf", f"sim_header: {value}")
    assert read_config(write(tmp_path, text))[0].text4vis.header == "mean"
    without = "\n".join(line for line in text.splitlines() if "sim_header" not in line)
    assert read_config(write(tmp_path, without))[0].text4vis.header == "mean"


def test_pretrain_takes_the_text_tower_from_clip() -> None:
    start = document(TEXT4VIS.replace("pretrain:", "pretrain: exp/last_model.pt")).values
    assert start["model"]["weights"] == "exp/last_model.pt"
    assert start["classifier"]["text_weights"] == "openai"
    bike = document(BIKE.replace("pretrain:", "pretrain: exp/last_model.pt")).values
    assert "text_weights" not in bike["classifier"]


def test_bike_files_name_their_method(tmp_path: Path) -> None:
    assert read_config(write(tmp_path, BIKE))[0].bike.interaction == "vcs"
    translation = document(BIKE)
    assert translation.values["method"] == "bike"
    assert translation.values["bike"] == {"interaction": "vcs"}
    assert translation.values["text4vis"]["header"] == "mean"
    assert translation.values["classifier"]["template"] == "This is a video about {}"
    assert translation.values["output"] == "exps/k400-bike-vit-l-14-336-f16"
    assert not any("fix_text" in note or "loss_type" in note for note in translation.notes)


@pytest.mark.parametrize(
    ("arch", "tm", "module", "noted"),
    [
        ("ViT-B/16", "tokenshift", "tokenshift", False),
        ("ViT-B/16", "tokent1d", "tokent1d", False),
        ("ViT-B/16", "None", None, False),
        ("ViT-B/16", "True", None, True),
        ("RN50", "True", "tsm", False),
        ("RN50", "tokent1d", "tsm", True),
        ("RN50", "False", None, False),
    ],
)
def test_temporal_modules(arch: str, tm: str, module: str | None, noted: bool) -> None:
    text = TEXT4VIS.replace("ViT-L/14-336px", arch).replace("tm: False", f"tm: {tm}")
    translation = document(text)
    assert translation.values["text4vis"].get("temporal_module") == module
    assert any("'network.tm'" in note for note in translation.notes) is noted


def test_multistep_milestones() -> None:
    def milestones(value: str) -> list[int]:
        text = TEXT4VIS.replace("type: cosine", f"type: multistep\n    lr_decay_step: {value}")
        return document(text).values["optim"]["milestones"]

    assert milestones("[8, 14]") == [8, 14]
    assert milestones("12") == [12, 24]
    with pytest.raises(UserError, match="begin after the warm-up of 5 epochs, got 5"):
        milestones("5")
    unused = document(TEXT4VIS.replace("type: cosine", "type: cosine\n    lr_decay_step: 9"))
    assert any("lr_decay_step' has no effect" in note for note in unused.notes)


def test_remaining_options() -> None:
    text = (
        TEXT4VIS.replace("dataset: k400", "dataset: something_v2")
        .replace("init: True", "init: False")
        .replace("random_shift: True", "random_shift: True\n    dense: True\n    shot: 2")
        .replace("joint_st: False", "joint_st: True")
        .replace("emb_dropout: 0.0", "emb_dropout: 0.1")
    )
    values = document(text).values
    assert values["data"]["something"] is True
    assert values["data"]["sampling"] == "dense"
    assert values["data"]["shots"] == 2
    assert values["name"].endswith("-f16-shot2")
    assert values["classifier"]["text_weights"] == "random"
    assert values["text4vis"]["joint"] is True
    assert values["text4vis"]["embedding_drop_out"] == 0.1
    deep = document(TEXT4VIS.replace("drop_out: 0.0", "drop_out: 0.2", 1))
    assert deep.values["text4vis"]["drop_out"] == 0.2
    assert any("text4vis.attention_drop_out" in note for note in deep.notes)


def test_a_file_without_a_solver_is_enough_to_evaluate(tmp_path: Path) -> None:
    config, _ = read_config(write(tmp_path, TEXT4VIS[: TEXT4VIS.index("solver:")]))
    assert config.data.num_frames == 16
    assert config.optim.lr == Config().optim.lr


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("num_segments: 16", "num_segment: 16",
         r":7: unknown key 'data\.num_segment' of an official .*Did you mean 'num_segments'"),
        ("        N: 2 #2", "        K: 2", r":21: unknown key 'data\.randaug\.K'.*Known: M, N"),
        ("seed: 1024", "sed: 1024", r":3: unknown key 'sed' .*Did you mean 'seed'"),
        ("seed: 1024", "losses:\n  x: 1", r":4: unknown key 'losses\.x'"),
        ("resume:", "resume: exp/last.pt", r":1: 'resume' names an official checkpoint"),
        ("modality: RGB", "modality: flow", r":6: 'data\.modality' should be RGB or video"),
        ("num_segments: 16", "num_segments: eight", r":7: 'data\.num_frames': input should be a"),
        ("batch_size: 16", "batch_size: many", r"'data\.batch_size' should be a whole number"),
        ("random_shift: True", "random_shift: False", r"'data\.random_shift' should be True"),
        ("random_shift: True", "fps: x", r"'data\.frames_per_second': input should be a valid num"),
        ("arch: ViT-L/14-336px", "arch: clip.pt", r"'network\.arch' names a file"),
        ("tm: False", "tm: shift", r"'text4vis\.temporal_module': input should be 'none'"),
        ("sim_header: Transf", "sim_header: LSTM", r"'network\.sim_header' should be Transf"),
        ("start_epoch: 0", "start_epoch: 3", r"'solver\.start_epoch' should be 0"),
        ("type: cosine", "type: linear", r"'optim\.schedule': input should be 'cosine'"),
        ("logging:\n", "logging: 3\nx:\n", r"'logging' should be a mapping, got 3"),
    ],
)  # fmt: skip
def test_mistakes_have_their_line(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in TEXT4VIS
    with pytest.raises(UserError, match=message):
        read_config(write(tmp_path, TEXT4VIS.replace(old, new, 1)))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("interaction: VCS", "interaction: XYZ", "should be DP or VCS"),
        ("loss_type: NCE", "loss_type: CE", "should be NCE"),
        ("fix_text: True", "fix_text: False", "should be True: the text tower"),
        ("fix_video: False", "fix_video: True", "should be False"),
        ("optim: adamw", "optim: sgd", "should be adamw"),
    ],
)
def test_bike_options_that_do_not_exist_here(old: str, new: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        document(BIKE.replace(old, new))


def test_the_charades_files_of_bike_run_as_they_are() -> None:
    text = BIKE.replace("random_shift: True", "random_shift: True\n    fps: 24")
    values = document(text.replace("img_{:05d}.jpg", "{}-{:06d}.jpg")).values
    assert values["data"]["frame_template"] == "{id}-{:06d}.jpg"
    assert values["data"]["frames_per_second"] == 24
    assert "min_frames" not in values["data"]
    assert document(BIKE).values["data"]["frame_template"] == "img_{:05d}.jpg"


def test_our_own_files_are_not_taken_for_official_ones() -> None:
    folder = Path(__file__).parents[2] / "configs"
    for path in folder.glob("*.yaml"):
        assert not is_official(yaml.safe_load(path.read_text())), path
    assert is_official(yaml.safe_load(TEXT4VIS))


def test_every_key_of_the_released_files_has_a_rule() -> None:
    keys = {key for key in _flat(yaml.safe_load(BIKE))}
    assert keys <= RULES.keys()


def _flat(node: dict[str, object], prefix: str = "") -> list[str]:
    return [
        name
        for key, value in node.items()
        for name in (_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [prefix + key])
    ]
