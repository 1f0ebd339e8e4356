"""A KV connector between a prefill node and a decode node of vllm-ascend: vLLM's ExampleConnector for vllm-ascend's paged KV.

vLLM's own class takes one tensor for each layer, loads whole blocks, and computes the rest of a prompt on the decode node.
vllm-ascend keeps a tuple of tensors. The connectors of a cluster bring the KV of all tokens but the last, and so does this one.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from vllm.distributed.kv_transfer.kv_connector.v1.example_connector import (
    ExampleConnector,
    ExampleConnectorMetadata,
    ReqMeta,
)


class FileKVConnector(ExampleConnector):
    """Files in the folder shared_storage_path of kv_connector_extra_config. A prompt must be prefilled in one step."""

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        """The tokens whose KV lies in files: all but the last one of a prompt, or none."""
        if not self._kv_transfer_config.is_kv_consumer or not self._found_match_for_request(request):
            return 0, False
        return len(request.prompt_token_ids) - 1 - num_computed_tokens, False

    def build_connector_meta(self, scheduler_output: Any) -> ExampleConnectorMetadata:
        """What the worker loads or stores in this step."""
        meta = ExampleConnectorMetadata()
        for new in scheduler_output.scheduled_new_reqs:
            loads = new.req_id in self._requests_need_load
            if loads or self._kv_transfer_config.is_kv_producer:
                tokens = new.prompt_token_ids
                blocks = torch.tensor(new.block_ids[0])[:, None] * self._block_size
                slots = (blocks + torch.arange(self._block_size)).flatten()[: len(tokens) - 1]
                meta.requests.append(ReqMeta(torch.tensor(tokens), slots, is_store=not loads, mm_hashes=[]))
        self._requests_need_load.clear()
        return meta

    def start_load_kv(self, forward_context: Any, **_: Any) -> None:
        """Copy the KV of the step's new requests from files into all layers."""
        for request in self._requests(is_store=False):
            for name, layer in forward_context.no_compile_layers.items():
                caches = getattr(layer, "kv_cache", None)
                if caches is None:
                    continue
                stored = safetensors.torch.load_file(self._file_of(name, request))
                for index, cache in enumerate(caches):
                    cache.flatten(0, 1)[request.slot_mapping.to(cache.device)] = stored[str(index)].to(cache.device)

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **_: Any) -> None:
        """Copy the KV of the step's new requests from one layer into files."""
        for request in self._requests(is_store=True):
            stored = {
                str(index): cache.flatten(0, 1)[request.slot_mapping.to(cache.device)].cpu().contiguous()
                for index, cache in enumerate(kv_layer)
            }
            safetensors.torch.save_file(stored, self._file_of(layer_name, request))

    def _requests(self, *, is_store: bool) -> Iterator[ReqMeta]:
        meta = self._get_connector_metadata()
        assert isinstance(meta, ExampleConnectorMetadata)
        return (request for request in meta.requests if request.is_store is is_store)

    def _found_match_for_request(self, request: Any) -> bool:
        return self._found_match_for_prompt(request.prompt_token_ids, [])

    def _found_match_for_prompt(self, prompt_token_ids: list[int], mm_hashes: list[str]) -> bool:
        return Path(self._generate_foldername_debug(torch.tensor(prompt_token_ids), [])).exists()

    def _file_of(self, layer_name: str, request: ReqMeta) -> str:
        return self._generate_filename_debug(layer_name, request.token_ids, [])
