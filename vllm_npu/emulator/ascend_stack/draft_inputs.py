"""vllm-ascend's compiled operator that makes the inputs of a parallel draft.

Source: csrc/moe/copy_and_expand_eagle_inputs of vllm-ascend 0.30.0rc2; its kernel is also that of 0.23.0.post1.
"""

import torch

SCHEMA = (
    "npu_copy_and_expand_eagle_inputs(Tensor target_token_ids, Tensor target_positions, Tensor next_token_ids, "
    "Tensor query_start_loc, Tensor query_end_loc, int padding_token_id, int parallel_drafting_token_id, "
    "int num_padding_slots_per_request, bool shift_input_ids, int total_draft_tokens) -> (Tensor out_input_ids, "
    "Tensor out_positions, Tensor out_is_rejected_token_mask, Tensor out_is_masked_token_mask, "
    "Tensor out_new_token_indices, Tensor out_hidden_state_mapping)"
)


def npu_copy_and_expand_eagle_inputs(
    target_token_ids: torch.Tensor,  # [num_tokens] int32
    target_positions: torch.Tensor,  # [num_tokens] int32
    next_token_ids: torch.Tensor,  # [num_requests] int32
    query_start_loc: torch.Tensor,  # [num_requests + 1] int32
    query_end_loc: torch.Tensor,  # [num_requests] int32 or int64: of each request the last token that was accepted
    padding_token_id: int,
    parallel_drafting_token_id: int,
    num_padding_slots_per_request: int,
    shift_input_ids: bool,
    total_draft_tokens: int,
) -> tuple[torch.Tensor, ...]:
    """For each request: its accepted tokens, its next token, drafting tokens, and padding for its rejected tokens.

    With shift_input_ids, a request's first token is left out. Returns token ids and positions [total_draft_tokens] int32, masks
    of the rejected and of the drafting tokens [total_draft_tokens] int8, the places of the new tokens
    [num_requests * num_padding_slots_per_request] int32, and with shift_input_ids the new place of each token
    [num_tokens] int32. Places that no request fills hold 0. LOCAL. A host sync.

    The kernel is registered for int32 alone. query_end_loc may be int64 here, because vllm-ascend computes it so where there is
    no Triton, as on the emulated device; with Triton it has int32.

    Raises NotImplementedError for other dtypes, and ValueError where total_draft_tokens is too small: the kernel would read or
    write other memory.
    """
    device, slots, skipped = target_token_ids.device, num_padding_slots_per_request, int(shift_input_ids)
    num_tokens, num_requests = len(target_token_ids), len(query_start_loc) - 1
    shapes = (total_draft_tokens, total_draft_tokens, num_requests * slots, num_tokens)
    if device.type == "meta":
        ids, positions, places, moved = (torch.empty(size, dtype=torch.int32, device=device) for size in shapes)
        rejected, drafting = (torch.empty(total_draft_tokens, dtype=torch.int8, device=device) for _ in range(2))
        return ids, positions, rejected, drafting, places, moved
    inputs = (target_token_ids, target_positions, next_token_ids, query_start_loc, query_end_loc)
    for tensor in inputs:
        if tensor.dtype != torch.int32 and not (tensor is query_end_loc and tensor.dtype == torch.int64):
            raise NotImplementedError(
                f"npu_copy_and_expand_eagle_inputs takes int32 tensors only, and got {tensor.dtype}"
            )
    tokens, old_positions, next_tokens, starts, ends = (tensor.tolist() for tensor in inputs)
    out_ids, out_positions, out_rejected, out_drafting = ([0] * total_draft_tokens for _ in range(4))
    out_places: list[int] = []
    out_moved = [0] * num_tokens
    for request in range(num_requests):
        first, after, last = starts[request], starts[request + 1], ends[request]
        num_valid, num_rejected = max(last - first + 1 - skipped, 0), max(after - last - 1, 0)
        place = first + request * (slots - skipped)
        length = num_valid + slots + num_rejected
        if place + length > total_draft_tokens:
            raise ValueError(
                f"npu_copy_and_expand_eagle_inputs: request {request} fills places {place} to {place + length - 1}, and "
                f"total_draft_tokens is {total_draft_tokens}"
            )
        # Where there are fewer tokens than valid places, the last token repeats.
        readable = min(num_valid, num_tokens - first - 1) if shift_input_ids else after - first
        kept = [tokens[first + skipped + min(i, readable - 1)] if readable > 0 else 0 for i in range(num_valid)]
        filled = slice(place, place + length)
        drafted = [next_tokens[request]] + [parallel_drafting_token_id] * (slots - 1)
        position = old_positions[first]
        out_ids[filled] = kept + drafted + [padding_token_id] * num_rejected
        out_positions[filled] = [position + i for i in range(num_valid + slots)] + [0] * num_rejected
        out_rejected[filled] = [0] * (num_valid + slots) + [1] * num_rejected
        out_drafting[filled] = [0] * (num_valid + 1) + [1] * (slots - 1) + [0] * num_rejected
        out_places += range(place + num_valid, place + num_valid + slots)
        if shift_input_ids:
            out_moved[first:after] = range(place, place + after - first)
    return (
        torch.tensor(out_ids, dtype=torch.int32, device=device),
        torch.tensor(out_positions, dtype=torch.int32, device=device),
        torch.tensor(out_rejected, dtype=torch.int8, device=device),
        torch.tensor(out_drafting, dtype=torch.int8, device=device),
        torch.tensor(out_places, dtype=torch.int32, device=device),
        torch.tensor(out_moved, dtype=torch.int32, device=device),
    )
