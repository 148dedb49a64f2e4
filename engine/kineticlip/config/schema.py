"""The fields of a configuration: frozen dataclasses, whole, with every default."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt

# Ranges, which config/load.py checks and names in errors. A bound of inf says: finite.
Count = Annotated[int, Ge(1)]
Natural = Annotated[int, Ge(0)]  # 0 mostly stands for "none" or "by itself"
Amount = Annotated[float, Ge(0), Lt(inf)]
Positive = Annotated[float, Gt(0), Lt(inf)]
Finite = Annotated[float, Gt(-inf), Lt(inf)]
Share = Annotated[float, Ge(0), Le(1)]
BelowOne = Annotated[float, Ge(0), Lt(1)]
Seed = Annotated[int, Ge(0), Lt(2**31)]  # numpy takes 32 bits, and the number of a rank is added

Precision = Literal["fp32", "bf16", "fp16"]
# int8 on a CPU and fp8 on a GPU are of the tower's products; everything else is bf16 then.
EvalPrecision = Literal["fp32", "bf16", "fp16", "int8", "fp8"]
EIGHT_BITS = ("int8", "fp8")
Compile = Literal["auto", "always", "never"]  # YAML reads on and off as booleans


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The CLIP tower and where its weights come from."""

    arch: str = "ViT-B-16"  # a name of kineticlip.models.architectures, or of open_clip
    weights: str = "openai"  # open_clip tag, hf-hub:..., a file, or "random"
    # official: a CLIP file's products go through fp16, as in the official clip.load (Text4Vis and
    # its kin); OpenAI's own files hold fp16 already, fine-tuned checkpoints are never rounded
    rounding: Literal["official", "none"] = "official"
    kernels: Literal["auto", "reference", "triton"] = "auto"
    attention: Literal["auto", "reference", "sdpa", "xformers", "triton"] = "auto"


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """Where the frozen classifier matrix [C, E] comes from."""

    source: str = "text"  # text, random_normal, random_orthogonal, or a .safetensors file
    template: str = "a video of a person {}."
    templates: tuple[str, ...] = ()  # several: the mean of their unit features; replaces template
    text_weights: str = ""  # empty: the text tower of model.weights
    center: bool = False  # remove the mean of the training classes' features
    training_labels: str = ""  # those classes, where others are scored (zero-shot)
    seed: Seed = 0  # of the two random sources


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Lists, labels, decoding and training-time sampling."""

    train_list: str = ""  # lines `path label` (videos) or `path frames label` (frame folders)
    train_root: str = ""
    val_list: str = ""
    val_root: str = ""
    labels: str = ""  # label CSV with columns id,name; or one name a line
    features: str = ""  # folder of `kineticlip features`, read in place of the videos
    frame_template: str = "img_{:05d}.jpg"  # {id} stands for the folder's own name
    frames_per_second: Amount = 24.0  # of the frame folders, where a list gives times (Charades)
    decoder: Literal["auto", "dali", "torchcodec", "pyav"] = "auto"
    num_frames: Count = 8  # T
    resolution: Count = 224  # S, side of the square crop
    pipeline: Literal["auto", "text4vis", "evl", "bike"] = "auto"  # auto: the method's own
    sampling: Literal["uniform", "dense"] = "uniform"
    sampling_rate: Count = 16  # frame stride of the evl pipeline's dense sampling
    augmentation: Literal["none", "released", "published"] = "released"
    flip: bool = True  # mirror half of the training clips; off where direction is the label
    something: bool = False  # Something-Something: fixed frame size, label-swapping mirror
    min_frames: Natural = 0  # shorter entries of the training list are dropped and counted
    val_min_frames: Natural = 0  # so for the list to score; officially 8 in training, 0 in tests
    shots: Natural = 0  # K-shot training; 0 trains on everything
    workers: Count = 2  # decoding threads of one process
    probe_cache: str = "auto"  # file of probes, so that opening again costs no pass; auto, off


@dataclass(frozen=True, kw_only=True)
class ViewConfig:
    """Views of one video at test time: clips x crops."""

    clips: Count = 1
    crops: Literal[1, 3, 5, 10] = 1
    sampling: Literal["uniform", "dense"] = "uniform"


@dataclass(frozen=True, kw_only=True)
class Text4VisConfig:
    """Text4Vis: frame embeddings, a temporal header, a frozen text classifier."""

    header: Literal["mean", "transformer"] = "transformer"
    header_layers: Natural = 6
    temporal_module: Literal["none", "tokenshift", "tokent1d", "tsm"] = "none"
    joint: bool = False  # joint space-time attention
    drop_out: BelowOne = 0.0  # stochastic depth of the last block; rises linearly from none
    attention_drop_out: BelowOne = 0.0  # of attention weights, rising alike; officially the same
    embedding_drop_out: BelowOne = 0.0


@dataclass(frozen=True, kw_only=True)
class ContrastiveConfig:
    """Text4Vis's contrastive baseline; its trunk and header are those of `text4vis` above."""

    loss: Literal["nce", "ds", "ce"] = "nce"  # ce: over all classes, encoded at every step
    text: Literal["online", "frozen"] = "online"  # frozen: features of the classes, made once
    gather: bool = True  # pairs of all processes are each other's negatives
    train_visual: bool = True


@dataclass(frozen=True, kw_only=True)
class BikeConfig:
    """BIKE: Text4Vis's trunk and header (`text4vis` above); how frames meet the class names."""

    interaction: Literal["vcs", "dp"] = "vcs"  # weighted by the words' saliency; or averaged
    # frames: without header and interaction, the softmax of each raw frame embedding, averaged;
    # the zero-shot numbers that the official test_zeroshot prints are these
    scores: Literal["head", "frames"] = "head"


@dataclass(frozen=True, kw_only=True)
class EvlConfig:
    """EVL: one query per clip reads the tokens of the last blocks of a frozen trunk."""

    layers: Count = 4  # K: decoder layers, on as many last blocks
    qkv_dim: Natural = 0  # D, width of the query's attention; 0: the trunk's width
    heads: Natural = 0  # 0: one for every 64 of the width
    mlp_factor: Positive = 4.0
    class_drop_out: BelowOne = 0.5  # before the last linear layer
    mlp_drop_out: BelowOne = 0.5
    temporal_conv: bool = True
    temporal_position: bool = True
    temporal_attention: bool = True
    finetune: bool = False  # train the trunk too
    backbone_precision: Literal["train", "bf16", "fp16"] = "train"  # of a frozen trunk in training
    backbone: str = "openai"  # the trunk, where model.weights holds a decoder alone


@dataclass(frozen=True, kw_only=True)
class VitaConfig:
    """Vita-CLIP: prompts around two frozen towers."""

    summary: bool = True  # a token a frame: what its class token learns of the other frames'
    local_prompts: bool = True  # a token for each frame of a clip, seen by all of them
    global_prompts: Natural = 8  # learned tokens of each block; 0: none
    text: Literal["prompts", "classifier"] = "prompts"  # learned words; or `classifier` above
    context: Count = 8  # learned words around a class name
    context_words: str = ""  # they start as these words and are shared; underscores are spaces
    position: Literal["end", "middle", "front"] = "end"  # of the class name
    per_class: bool = True  # every class its own words; off: one set that fits any classes
    train_cls_proj: bool = False  # the published code leaves this layer as it was drawn


@dataclass(frozen=True, kw_only=True)
class XClipConfig:
    """X-CLIP: message tokens, frame integration, text conditioned on the video."""

    integration_layers: Natural = 1  # of the transformer over frame embeddings
    integration_heads: Natural = 0  # 0: one for every 64 of the width
    prompt_layers: Natural = 2  # of the cross-attention from text to patches
    prompt_heads: Count = 8
    prompt_scale: Finite = 1e-4  # initial weight of what the video adds to the text
    train_text: bool = False  # the text tower; the released runs keep it as it is


@dataclass(frozen=True, kw_only=True)
class VifiConfig:
    """ViFi-CLIP: both towers fine-tuned, frame embeddings averaged."""

    train_text: bool = True
    train_visual: bool = True


@dataclass(frozen=True, kw_only=True)
class ActionClipConfig:
    """ActionCLIP: its header is that of `text4vis` above."""

    templates: tuple[str, ...] = ("actionclip",)  # one is drawn for each training clip
    train_text: bool = True


@dataclass(frozen=True, kw_only=True)
class OpenVclipConfig:
    """Open-VCLIP: attention over neighbouring frames, weights drawn back towards CLIP."""

    clip_share: Share = 0.0  # of CLIP's own weights in those that are scored
    clip_weights: str = "openai"
    pull: Amount = 0.0  # in training: of a second loss, at weights drawn back; the paper's is 0.5
    pull_shares: tuple[BelowOne, BelowOne] = (0.0, 0.6)  # of CLIP's weights in it, drawn every time


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW with two learning rates and a per-iteration schedule."""

    lr: Amount = 5e-5
    clip_ratio: Amount = 0.1  # learning rate of the CLIP parameters, relative to lr
    weight_decay: Amount = 0.2
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.999)
    eps: Amount = 1e-8
    schedule: Literal["cosine", "multistep", "constant"] = "cosine"
    warmup_epochs: Amount = 5.0
    milestones: tuple[Amount, ...] = ()  # epochs, for multistep
    official_updates: bool = False  # the official code's steps: lr set every tenth iteration
    rate_at: Literal["middle", "start"] = "middle"  # the point of a step that gives it its lr


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The training loop: length, batch, precision, ZeRO, what is written and when."""

    epochs: Amount = 30.0
    steps: Natural = 0  # optimiser steps, in place of epochs; 0: epochs
    average_from: Natural = 0  # mean of the weights at the ends of this and later epochs; 0: none
    batch_size: Count = 256  # global: clips per optimiser step
    micro_batch_size: Count = 8  # clips per process and forward
    precision: Precision = "bf16"
    zero_stage: Literal[0, 1, 2, 3] = 1
    gradient_clipping: Amount = 0.0  # 0 turns it off
    activation_checkpointing: bool = False  # whole blocks anew in the backward pass
    recompute_outputs: bool = False  # LayerNorm's and QuickGELU's alone: no product twice
    deepspeed: str = ""  # a DeepSpeed JSON laid under the engine's own settings
    checkpoint_every: Count = 1000  # optimiser steps
    keep_checkpoints: Count = 2
    eval_every: Amount = 1.0  # epochs; 0 evaluates at the end only
    log_every: Count = 10  # optimiser steps
    max_skipped_steps: Natural = 20  # consecutive non-finite steps before the run stops


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """The evaluation loop."""

    precision: EvalPrecision = "bf16"
    compile: Compile = "auto"  # a CUDA graph on a GPU, packed layers on a CPU; always: Inductor
    batch_frames: Natural = 0  # images per forward; 0 finds the fastest that fits
    deterministic: bool = False  # fixed batch shapes: results repeat to the byte


@dataclass(frozen=True, kw_only=True)
class Config:
    """One run, whole. `method` names an entry of kineticlip.methods.METHODS."""

    name: str = "run"
    method: str = "text4vis"
    seed: Seed = 1024
    output: str = ""  # empty: runs/<name>
    model: ModelConfig = field(default_factory=ModelConfig)
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)
    data: DataConfig = field(default_factory=DataConfig)
    test: ViewConfig = field(default_factory=ViewConfig)
    text4vis: Text4VisConfig = field(default_factory=Text4VisConfig)
    contrastive: ContrastiveConfig = field(default_factory=ContrastiveConfig)
    bike: BikeConfig = field(default_factory=BikeConfig)
    evl: EvlConfig = field(default_factory=EvlConfig)
    vitaclip: VitaConfig = field(default_factory=VitaConfig)
    xclip: XClipConfig = field(default_factory=XClipConfig)
    vificlip: VifiConfig = field(default_factory=VifiConfig)
    actionclip: ActionClipConfig = field(default_factory=ActionClipConfig)
    openvclip: OpenVclipConfig = field(default_factory=OpenVclipConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    @property
    def output_dir(self) -> Path:
        return Path(self.output or f"runs/{self.name}")
