"""hostile.frames: what no frontend should send."""

from __future__ import annotations

from typing import Any

from .common import Frames, Message, encode
from .inputs import add_message, multimodal_features, request


def engine_verdict(frames: Frames) -> str | None:
    """What decoding does to the engine's input thread: None, or the exception that ends it."""
    from vllm.v1.engine import EngineCoreRequest, EngineCoreRequestType
    from vllm.v1.serial_utils import MsgpackDecoder

    try:
        kind, *data = frames
        request_type = EngineCoreRequestType(kind)
        if request_type == EngineCoreRequestType.ADD:
            MsgpackDecoder(EngineCoreRequest).decode(data)
        else:
            decoded = MsgpackDecoder().decode(data)
            if request_type == EngineCoreRequestType.UTILITY:
                _, _, _method, _args = decoded
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:60]}"
    return None


def hostile_messages() -> list[Message]:
    """Messages a frontend should not send, each with what vLLM's decoder does with it."""
    import msgspec
    from vllm.pooling_params import PoolingParams

    pack = msgspec.msgpack.encode
    found: list[Message] = []

    def put(label: str, frames: Frames, **more: Any) -> None:
        verdict = engine_verdict(frames)
        found.append((label, frames, {"decoder": verdict, **more}))

    text = encode(request())[0]
    fields: list[Any] = msgspec.msgpack.decode(text)
    names = list(type(request()).__struct_fields__)

    def changed(name: str, value: Any) -> Frames:
        copy = list(fields)
        copy[names.index(name)] = value
        return [b"\x00", pack(copy)]

    put("no_payload", [b"\x00"], must_refuse=True)
    put("empty_payload", [b"\x00", b""])
    put("unknown_type", [b"\x07", pack([])])
    put("type_of_two_bytes", [b"\x00\x00", text])
    put("ready_on_input", [b"READY"])
    put("executor_failed", [b"\x04", pack([])], must_refuse=True)
    put("wakeup", [b"\x05", pack([])], must_refuse=True)
    put("start_dp_wave", [b"\x02", pack([1, None])], must_refuse=True)
    put("reserved_byte", [b"\x01", b"\xc1"])
    put("trailing_bytes", [b"\x00", text + b"\xc0"])
    put("add_as_map", [b"\x00", pack({"request_id": "x"})])
    put("add_too_short", [b"\x00", pack(fields[:3])])
    put("add_required_only", [b"\x00", pack(fields[: names.index("prompt_embeds")])])
    put("add_one_more", [b"\x00", pack([*fields, "later"])])
    put("add_five_more", [b"\x00", pack([*fields, 1, None, {}, [1], b"x"])])
    put("abort_of_map", [b"\x01", pack({"a": 1})], must_refuse=True)
    put("abort_of_ints", [b"\x01", pack([1, 2])], must_refuse=True)
    put("abort_invalid_utf8", [b"\x01", b"\x91\xa2\xff\xfe"])
    put("utility_three_fields", [b"\x03", pack([0, 1, "m"])], must_refuse=True)
    put("utility_five_fields", [b"\x03", pack([0, 1, "m", [], 5])], must_refuse=True)
    put("utility_map", [b"\x03", pack({"a": 1})], must_refuse=True)
    for code in (1, 2, 4, -1):
        ext = msgspec.msgpack.Ext(code, b"\x80\x04N.")
        put(
            f"utility_ext_{code}",
            [b"\x03", pack([0, 1, "collective_rpc", ["m", None, [ext], {}]])],
            must_refuse=code in (1, 2),
        )
    put(
        "utility_unhashable_key",
        [b"\x03", b"\x94\x00\x01\xa1m\x91\x81\x91\x81\x01\x02\x03"],
    )
    put("utility_map_key", [b"\x03", b"\x94\x00\x01\xa1m\x91\x81\x80\x03"])
    put("utility_array_key", [b"\x03", b"\x94\x00\x01\xa1m\x91\x81\x91\x01\x03"])
    put("utility_deep", [b"\x03", b"\x94\x00\x01\xa1m" + b"\x91" * 5000 + b"\x90"])
    put("utility_negative_call", [b"\x03", pack([0, -1, "m", []])], must_refuse=True)
    put("utility_negative_client", [b"\x03", pack([-1, 1, "m", []])], must_refuse=True)
    put(
        "utility_fault_tolerance",
        [b"\x03", pack([0, 1, "handle_fault_tolerance", [{}]])],
        must_refuse=True,
    )
    put(
        "utility_method_as_bytes",
        [b"\x03", pack([0, 1, "collective_rpc", [b"\x80\x04N.", None, [], {}]])],
        must_refuse=True,
    )
    wrong: dict[str, list[Any]] = {
        "request_id": [None, 5, b"x"],
        "prompt_token_ids": ["x", [1, "2"], [1, None], [1.5], [1.0], [[1]], [True]],
        "mm_features": [{}, [1], ["x"], [{}], [{"data": None}]],
        "sampling_params": [[], 5, "x"],
        "pooling_params": [{}, 5],
        "arrival_time": [None, "x", 5, True],
        "lora_request": [{}, ["n"], [1, 2], ["n", 0], ["n", "x"], "x"],
        "cache_salt": [5, b"x"],
        "data_parallel_rank": ["x", 1.5, True],
        "prompt_embeds": [
            5,
            ["bfloat16", [2, 2], 7],
            ["bfloat16", [2, 2], 1],
            ["bfloat16", [2, 2], -1],
            ["bfloat16", [2, 2]],
            ["nonsense", [2, 2], b"\x00" * 8],
            ["bfloat16", [2, 2], b"\x00" * 8],
            ["bfloat16", [2, 2], b"\x00" * 7],
            ["bfloat16", [2, 3], b"\x00" * 8],
            ["bfloat16", [2, 2], {"handle": 1}],
            ["bfloat16", "x", b"\x00" * 8],
            ["bfloat16", [0], b""],
            ["bfloat16", [1], b""],
        ],
        "client_index": [None, "x", 1.5, True],
        "current_wave": [None, "x"],
        "priority": [None, "x", 1.5],
        "trace_headers": [[], {1: "x"}, {"x": 1}, {"a": "b"}],
        "resumable": [None, 1],
        "external_req_id": [5],
        "reasoning_ended": [5, "x"],
        "reasoning_parser_kwargs": [[], {1: 2}],
        "abort_immediately": [None, 1],
        "session_id": [5],
        "kv_hints": [5, [], {"protocol_version": 1}],
        "prompt_is_token_ids": [5, [1], [True, False]],
        "eos_token_id": ["x", 1.5],
    }
    for name, values in wrong.items():
        for number, value in enumerate(values):
            if name in names:
                put(f"add_{name}_{number}", changed(name, value))
    params = fields[names.index("sampling_params")]
    odd: dict[str, list[Any]] = {
        "n": [0, -1, "x", 1.5, None, True],
        "temperature": [-1.0, "x", None, 0, 3.0, float("nan"), float("inf")],
        "top_p": [0.0, 1.5, "x", 1],
        "top_k": [-2, 1.5, "x"],
        "min_p": [-0.5, 2.0],
        "presence_penalty": [3.0, "x"],
        "frequency_penalty": [-3.0],
        "repetition_penalty": [0.0, -1.0],
        "max_tokens": [0, -5, "x", 1.5],
        "min_tokens": [-1, "x", 17],
        "logprobs": [-2, "x", 1.5],
        "prompt_logprobs": [-2, "x"],
        "seed": ["x", 1.5],
        "stop": [5, [5], [""], "x", ["x"]],
        "stop_token_ids": [5, ["x"], [1.5]],
        "bad_words": [5, [5], [""]],
        "ignore_eos": [5, None],
        "detokenize": ["x"],
        "skip_special_tokens": [1],
        "logit_bias": [[], {"x": 1.0}, {1: "x"}, {1: 2}],
        "allowed_token_ids": [5, ["x"]],
        "extra_args": [[], {1: 2}],
        "output_kind": [7, "x", -1],
        "structured_outputs": [{}, {"regex": 5}, {"regex": "a", "json": "b"}, []],
        "_all_stop_token_ids": [5, ["x"]],
        "_eos_token_id": ["x"],
        "unknown_key": [5, {"a": [1]}],
    }
    for name, values in odd.items():
        for number, value in enumerate(values):
            put(
                f"params_{name}_{number}",
                changed("sampling_params", {**params, name: value}),
            )
    put("params_int_key", changed("sampling_params", {**params, 5: 1}))
    for number, value in enumerate([{"detokenize": False, "stop": ["x"]}, {"n": 2}]):
        put(f"params_pair_{number}", changed("sampling_params", {**params, **value}))
    pooling: list[Any] = [
        [5],
        [None, "x"],
        [None, None, None, ["x"]],
        [None, None, None, None, 5],
        [None, None, None, None, "no-such-task"],
        [],
    ]
    for number, value in enumerate(pooling):
        copy = list(fields)
        copy[names.index("sampling_params")] = None
        copy[names.index("pooling_params")] = value
        put(f"pooling_{number}", [b"\x00", pack(copy)])
    pooling_names = list(PoolingParams.__struct_fields__)
    ends = [[None] * len(pooling_names) for _ in range(4)]
    for number, (name, value) in enumerate(
        [
            ("output_kind", 0),
            ("output_kind", 2),
            ("truncate_prompt_tokens", -2),
            ("extra_kwargs", {1: 2}),
        ]
    ):
        if name in pooling_names:
            ends[number][pooling_names.index("output_kind")] = 2
            ends[number][pooling_names.index("requires_token_ids")] = False
            ends[number][pooling_names.index(name)] = value
            copy = list(fields)
            copy[names.index("sampling_params")] = None
            copy[names.index("pooling_params")] = ends[number]
            put(f"pooling_full_{number}", [b"\x00", pack(copy)])
            copy[names.index("pooling_params")] = [*ends[number], "later"]
            put(f"pooling_longer_{number}", [b"\x00", pack(copy)])
    put(
        "no_params",
        changed("sampling_params", None),
    )
    image_kind, image, *aux = add_message("x", request(mm_features=multimodal_features()))[1]
    put("image_complete", [image_kind, image, *aux])
    put("image_without_tensor_frames", [image_kind, image])
    put("image_short_tensor_frame", [image_kind, image, *[a[:-1] for a in aux]])
    put("image_longer_tensor_frame", [image_kind, image, *[a + b"0000" for a in aux]])
    put("image_extra_frame", [image_kind, image, *aux, b"more"])
    features = msgspec.msgpack.decode(image)[names.index("mm_features")]
    plain_elem = {"data": None, "field": ["batched"]}
    edits: list[tuple[str, Any]] = [
        ("modality", 5),
        ("identifier", None),
        ("mm_position", 5),
        ("mm_position", {"offset": "x", "length": 1}),
        ("mm_position", {"offset": 1}),
        ("data", 5),
        ("data", None),
        ("data", {"k": 5}),
        ("data", {"k": {"data": None}}),
        ("data", {"k": {"data": None, "field": ["nonsense", {}]}}),
        ("data", {"k": {"data": ["float32", [1], 9], "field": ["batched", {}]}}),
        ("data", {"k": {"data": "x", "field": ["batched", {}]}}),
        ("data", {"k": {"data": [5, 2.5], "field": ["batched", {}]}}),
        ("data", {"k": {"data": None, "field": ["batched", {"bad": 1}]}}),
        ("mm_hash", 5),
        ("data", []),
        ("data", {}),
        ("data", [{"modality": m, "key": k, **plain_elem} for m, k in (("a", "k"), ("b", "l"))]),
        ("data", [{"modality": m, "key": k, **plain_elem} for m, k in (("a", "k"), ("a", "l"))]),
    ]
    for number, (key, value) in enumerate(edits):
        feature = {**features[0], key: value}
        frames = changed("mm_features", [feature])
        put(f"image_edit_{number}", [*frames, *aux])
    return found
