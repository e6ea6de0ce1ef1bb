"""How tensor parallelism splits each layer of the model."""

# Tensor-parallel layout of the layers: pattern of parameter names -> style (see
# parallel/tensor/layers.py).
TENSOR_LAYOUT = {
    "relative_bias.*": "column",  # a row per head
    "embed.tokens": "vocabulary",
    "embed*.positions": "sequence",
    "embed.segments": "sequence",
    "embed.norm": "sequence",
    "embed*.patches": "sequence",
    "embed.class_token": "sequence",
    "embed*.convolution_*": "sequence",
    **{
        f"blocks.*.{branch}{place}_norm": "sequence"
        for branch in ("attention", "cross", "feed_forward")
        for place in ("", "_output", "_sum")
    },
    "blocks.*.turn_norm": "sequence",
    "blocks.*attention.query_norm": "shared",
    "blocks.*attention.key_norm": "shared",
    "blocks.*attention.queries_norm": "heads",
    "blocks.*attention.keys_norm": "heads",
    "blocks.*attention.query": "heads",
    "blocks.*attention.key": "heads",
    "blocks.*attention.value": "heads",
    "blocks.*attention.output": "row",
    "blocks.*.feed_forward.gate": "column",
    "blocks.*.feed_forward.up": "column",
    "blocks.*.feed_forward.down": "row",
    "ctc.output": "shared",  # computed on every rank, counted on one
    "auxiliary_heads.*": "sequence",  # of few classes
    "head.norm": "sequence",
    "head.dense*": "sequence",
    "head.output": "vocabulary",
}
