"""Multi-head attention of a ViT block, and of its class token alone.

`attention` takes packed projections, and keys and values that several images share;
`class_attention` one query an image, its keys and values never projected.
"""

from kineticlip_kernels.attention.class_ops import (
    MAX_CLASS_HEADS,
    MAX_CLASS_WIDTH,
    class_attention,
    class_attention_reasons,
)
from kineticlip_kernels.attention.ops import (
    FACES,
    MAX_HEAD_WIDTH,
    AttentionImpl,
    attention,
    attention_reasons,
    choose_attention,
)
from kineticlip_kernels.attention.reference import (
    absorbed_query,
    attention_reference,
    class_attention_reference,
    project_values,
)
from kineticlip_kernels.attention.sources import (
    MAX_SOURCES,
    Source,
    check_sources,
)
from kineticlip_kernels.attention.torch_faces import (
    CHUNK,
    XFORMERS_INSTALLED,
    attention_chunked,
    attention_sdpa,
    attention_xformers,
    xformers_reasons,
)

__all__ = [
    "CHUNK",
    "FACES",
    "MAX_CLASS_HEADS",
    "MAX_CLASS_WIDTH",
    "MAX_HEAD_WIDTH",
    "MAX_SOURCES",
    "XFORMERS_INSTALLED",
    "AttentionImpl",
    "Source",
    "absorbed_query",
    "attention",
    "attention_chunked",
    "attention_reasons",
    "attention_reference",
    "attention_sdpa",
    "attention_xformers",
    "check_sources",
    "choose_attention",
    "class_attention",
    "class_attention_reasons",
    "class_attention_reference",
    "project_values",
    "xformers_reasons",
]
