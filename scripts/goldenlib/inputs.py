"""input.frames: what a frontend sends to an engine."""

from __future__ import annotations

import dataclasses
from typing import Any

from .common import Message, encode, plain

# Fixed, so that a second run writes the same bytes.
ARRIVAL = 1700000000.25


def request(**changes: Any) -> Any:
    """An EngineCoreRequest; fields that this version does not have are left out."""
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine import EngineCoreRequest

    values: dict[str, Any] = {
        "request_id": "cmpl-7a2f-0",
        "prompt_token_ids": [1, 200, 40000, 100000],
        "mm_features": None,
        "sampling_params": SamplingParams(temperature=0.0, max_tokens=16),
        "pooling_params": None,
        "eos_token_id": None,
        "arrival_time": ARRIVAL,
        "lora_request": None,
        "cache_salt": None,
        "data_parallel_rank": None,
    }
    values.update(changes)
    known = EngineCoreRequest.__struct_fields__
    return EngineCoreRequest(**{key: value for key, value in values.items() if key in known})


def add_message(label: str, value: Any) -> Message:
    """An ADD of this request, and what vLLM decodes from it."""
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.serial_utils import MsgpackDecoder

    payload = encode(value)
    decoded = MsgpackDecoder(EngineCoreRequest).decode(payload)
    expect = {
        "type": "ADD",
        "request_id": decoded.request_id,
        "client_index": decoded.client_index,
        "current_wave": decoded.current_wave,
        "data_parallel_rank": decoded.data_parallel_rank,
        "frames": len(payload) + 1,
    }
    return label, [b"\x00", *payload], expect


def multimodal_features() -> list[Any]:
    """One image feature with a large tensor (own frame) and small ones (inline)."""
    import torch
    from vllm.multimodal.inputs import (
        MultiModalBatchedField,
        MultiModalFeatureSpec,
        MultiModalFieldElem,
        MultiModalFlatField,
        MultiModalKwargsItem,
        PlaceholderRange,
    )

    def elem(key: str, data: Any, field: Any) -> Any:
        names = {f.name for f in dataclasses.fields(MultiModalFieldElem)}
        extra = {"modality": "image", "key": key}
        return MultiModalFieldElem(
            data=data, field=field, **{k: v for k, v in extra.items() if k in names}
        )

    elems = {
        "pixel_values": elem(
            "pixel_values",
            torch.arange(512, dtype=torch.float32).reshape(2, 256),
            MultiModalFlatField(slices=[slice(0, 2)]),
        ),
        "image_grid_thw": elem(
            "image_grid_thw",
            torch.tensor([1, 2, 2], dtype=torch.int64),
            MultiModalBatchedField(),
        ),
    }
    if hasattr(MultiModalKwargsItem, "from_elems"):
        item = MultiModalKwargsItem.from_elems(list(elems.values()))
    else:
        item = MultiModalKwargsItem(elems)
    return [
        MultiModalFeatureSpec(
            data=item,
            modality="image",
            identifier="a" * 64,
            mm_position=PlaceholderRange(
                offset=1, length=4, is_embed=torch.tensor([True, True, False, True])
            ),
        )
    ]


def input_messages() -> list[Message]:
    """What a frontend sends to an engine."""
    import torch
    from vllm.lora.request import LoRARequest
    from vllm.pooling_params import PoolingParams
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine import EngineCoreRequestType as Kind

    structured = structured_params()
    rich = SamplingParams(
        n=1,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        repetition_penalty=1.1,
        temperature=0.7,
        top_p=0.9,
        top_k=20,
        min_p=0.05,
        seed=42,
        stop=["\n\n", "END"],
        stop_token_ids=[2, 32000],
        bad_words=["bad"],
        ignore_eos=True,
        max_tokens=64,
        min_tokens=1,
        logprobs=5,
        prompt_logprobs=2,
        logit_bias={17: -1.5},
        allowed_token_ids=None,
        extra_args={"nested": {"list": [1, 2.5, None, True, "x"]}},
        **structured,
    )
    messages = [
        add_message("add_text", request()),
        add_message("add_client_300", request(client_index=300, current_wave=70000)),
        add_message(
            "add_rich",
            request(
                sampling_params=rich,
                lora_request=LoRARequest("adapter", 7, "/adapters/seven"),
                cache_salt="salt",
                data_parallel_rank=1,
                client_index=3,
                current_wave=12,
                priority=-2,
                trace_headers={"traceparent": "00-abc-def-01"},
                external_req_id="cmpl-7a2f",
                reasoning_ended=False,
                reasoning_parser_kwargs={"enable": True},
                session_id="session",
                eos_token_id=2,
            ),
        ),
        add_message(
            "add_long_prompt",
            request(prompt_token_ids=[(i * 7919) % 152064 for i in range(2000)]),
        ),
        add_message(
            "add_embeds",
            request(
                prompt_token_ids=None,
                prompt_embeds=torch.zeros((4, 64), dtype=torch.bfloat16),
                client_index=1,
            ),
        ),
        add_message(
            "add_pooling",
            request(sampling_params=None, pooling_params=PoolingParams(task="embed")),
        ),
        add_message("add_image", request(mm_features=multimodal_features())),
    ]
    ids = ["cmpl-7a2f-0", "chatcmpl-9c1d-0"]
    messages.append(
        (
            "abort",
            [Kind.ABORT.value, *encode(ids)],
            {"type": "ABORT", "request_ids": ids},
        )
    )
    calls: list[tuple[str, int, int, str, tuple[Any, ...]]] = [
        ("call_supported_tasks", 0, 5, "get_supported_tasks", ()),
        ("call_pause", 2, 2**64 - 1, "pause_scheduler", ("wait", True)),
        ("call_set_weight_version", 130, 70000, "set_weight_version", ("step-12",)),
        (
            "call_reload_weights",
            0,
            12345,
            "collective_rpc",
            ("reload_weights", None, (), {"weights_path": "/models/next"}),
        ),
        (
            "call_rich_arguments",
            70000,
            300,
            "collective_rpc",
            ("method", 1.5, [1, -7, 2**40], {"blob": b"\x00\x01", "x": None}),
        ),
        ("call_add_lora", 1, 9, "add_lora", (LoRARequest("adapter", 7, "/a/7"),)),
    ]
    for label, client, call, method, args in calls:
        messages.append(
            (
                label,
                [Kind.UTILITY.value, *encode((client, call, method, args))],
                {
                    "type": "UTILITY",
                    "client_index": client,
                    "call_id": call,
                    "method": method,
                    "args": plain(args),
                },
            )
        )
    return messages


def structured_params() -> dict[str, Any]:
    """Asks for JSON where this version has a class for it."""
    import vllm.sampling_params as params

    if hasattr(params, "StructuredOutputsParams"):
        return {
            "structured_outputs": params.StructuredOutputsParams(
                json={"type": "object", "properties": {"a": {"type": "integer"}}}
            )
        }
    return {}
