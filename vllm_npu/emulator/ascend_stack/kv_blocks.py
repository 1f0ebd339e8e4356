"""vllm-ascend's compiled operator that orders blocks of the KV cache which arrived from several ranks of a prefill node.

Source: csrc/moe/transpose_kv_cache_by_block of vllm-ascend 0.30.0rc2, its README; the operator is also that of 0.23.0.post1.
"""

from collections.abc import Sequence

import torch

SCHEMA = (
    "transpose_kv_cache_by_block(Tensor[] kCache, Tensor[] vCache, Tensor blockIDs, int blockSize, int headNum, int headDim, "
    "int splitNum, int layerNum) -> ()"
)


def transpose_kv_cache_by_block(
    k_cache: Sequence[torch.Tensor],  # of each layer [num_blocks, block_size, num_heads, head_size]
    v_cache: Sequence[torch.Tensor],
    block_ids: torch.Tensor,  # [n] int64
    block_size: int,
    head_num: int,
    head_dim: int,
    split_num: int,
    layer_num: int,
) -> None:
    """In each named block: from [split_num, block_size, heads of a split] to [block_size, split_num, heads of a split].

    In place. LOCAL. Raises NotImplementedError for caches of other sizes than the arguments say, which the kernel would read
    beyond their ends.
    """
    if block_ids.device.type == "meta":
        return
    if len(k_cache) != layer_num or len(v_cache) != layer_num or head_num % split_num:
        raise NotImplementedError(
            f"transpose_kv_cache_by_block takes {layer_num} layers, and {head_num} heads in {split_num} parts; got "
            f"{len(k_cache)} and {len(v_cache)} caches"
        )
    for cache in (*k_cache, *v_cache):
        if cache.shape[1:] != (block_size, head_num, head_dim):
            raise NotImplementedError(
                f"transpose_kv_cache_by_block takes blocks of {(block_size, head_num, head_dim)}, not {tuple(cache.shape[1:])}"
            )
        blocks = cache[block_ids]
        ordered = blocks.reshape(len(block_ids), split_num, block_size, -1).transpose(1, 2)
        cache[block_ids] = ordered.reshape(blocks.shape)
