"""A table of bad inputs: `CASES` maps the name of a class of faults to (description, call) pairs.

Each call must raise a TypeError, ValueError or RuntimeError whose message is one line, and itself asserts that the tensors
it was handed are as before.
"""

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrizations

import hta_fused as hta
from hta_fused import schedule
from hta_fused.partition import Partition

Case = tuple[str, Callable[[], Any]]
CASES: dict[str, list[Case]] = {}
ERRORS = (TypeError, ValueError, RuntimeError)
NO_NUMBERS: dict[str, Any] = {"a string": "0.1", "None": None, "a flag": True, "a list": [0.1], "complex": 0.1j}
BEYOND: dict[str, Any] = {"NaN": math.nan, "negative": -0.1, "-inf": -math.inf, "10^400": 10**400}


def unchanged(call: Callable[[], Any], tensors: Iterable[Any]) -> Any:
    """Calls; where that raises, asserts that the tensors hold the bits they held."""
    before = [
        (t, t.detach().clone())
        for t in tensors
        if isinstance(t, torch.Tensor) and t.layout == torch.strided and not t.is_meta
    ]
    try:
        return call()
    except ERRORS:
        for tensor, was in before:
            assert torch.equal(bits(tensor), bits(was)), "a buffer was changed"
        raise


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)


def case(kind: str, description: str, call: Callable[[], Any]) -> None:
    CASES.setdefault(kind, []).append((description, call))


# ----------------------------------------------------------------------------------------------------------------- models


class Net(nn.Module):
    """A few layers, a parameter of one element, tied weights."""

    def __init__(self, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(16, 16)
        self.tied = nn.Linear(16, 16, bias=False)
        self.tied.weight = self.fc.weight
        self.gain = nn.Parameter(torch.tensor(1.5))
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.to(dtype)

    def forward(self, x):
        return self.tied(self.fc(self.relu(self.norm(self.conv(x))).flatten(1))) * self.gain


class Wrapped(nn.Module):
    """As LoRA: the layer itself, and new parameters beside it."""

    def __init__(self, inner: nn.Linear):
        super().__init__()
        self.inner = inner
        self.down = nn.Parameter(torch.zeros(2, inner.in_features))

    def forward(self, x):
        return self.inner(x)


def buffers_of(optimizer: hta.CoupledOptimizer) -> list[torch.Tensor]:
    replicas = optimizer.replicas
    anchor = [] if replicas.anchor is None else [replicas.anchor]
    return [replicas.params, replicas.grads, *anchor, *optimizer._buffers.values(), optimizer._stats, optimizer.rules]


def trained(**options: Any) -> hta.CoupledOptimizer:
    """An optimizer over two copies in the middle of its training, with gradients."""
    replicas = hta.Replicas(Net(), compute_dtype=options.pop("compute_dtype", None))
    proposal, coupling = options.pop("proposal", hta.SGD(0.1, 0.9)), options.pop("coupling", hta.Homotopy(0.1))
    optimizer = hta.CoupledOptimizer(replicas, proposal, coupling, **options)
    for _ in range(2):
        for row in replicas.grads:
            for view in replicas.layout.views(row):  # not the padding
                view.normal_()
        optimizer.step()
    return optimizer


def at_step(change: Callable[[hta.CoupledOptimizer], Any], **options: Any) -> Callable[[], Any]:
    """A case in which `change` is done to a trained optimizer, whose next step must refuse it."""

    def call() -> None:
        optimizer = trained(**options)
        change(optimizer)
        steps = optimizer.steps
        try:
            unchanged(optimizer.step, buffers_of(optimizer))
        except ERRORS:
            assert optimizer.steps == steps
            raise

    return call


# --------------------------------------------------------------------------------------------------- replaced parameters


def fresh(p: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(p.detach().clone())


def assign(net: nn.Module) -> None:
    net.load_state_dict(copy.deepcopy(net.state_dict()), assign=True)


def untie(net: Any) -> None:
    net.tied.weight = fresh(net.fc.weight)


def low_level(net: Any) -> None:
    net.conv._parameters["weight"] = fresh(net.conv.weight)


REPLACED: dict[str, Callable[[Any], Any]] = {
    "load_state_dict(assign=True)": assign,
    "a parameter assigned": lambda net: setattr(net.conv, "weight", fresh(net.conv.weight)),
    "a bias assigned": lambda net: setattr(net.fc, "bias", fresh(net.fc.bias)),
    "one element assigned, of the same value": lambda net: setattr(net, "gain", fresh(net.gain)),
    "a parameter put into _parameters": low_level,
    "a parameter removed": lambda net: setattr(net.conv, "bias", None),
    "a parameter deleted": lambda net: delattr(net, "gain"),
    "tied weights untied": untie,
    "weights tied": lambda net: setattr(net.norm, "weight", net.norm.bias),
    "a layer replaced": lambda net: setattr(net, "fc", nn.Linear(16, 16)),
    "an activation replaced by one with parameters": lambda net: setattr(net, "relu", nn.PReLU()),
    "a layer removed": lambda net: delattr(net, "norm"),
    "a layer wrapped with new parameters": lambda net: setattr(net, "fc", Wrapped(net.fc)),
    "a parameter added": lambda net: net.register_parameter("extra", nn.Parameter(torch.zeros(3))),
    "a parameter added to a layer without any": lambda net: net.relu.register_parameter("a", nn.Parameter(torch.ones(1))),
    "a frozen layer set to train": lambda net: net.frozen.requires_grad_(True),
    "a layer added": lambda net: net.add_module("head", nn.Linear(2, 2)),
    "weight_norm": lambda net: parametrizations.weight_norm(net.conv),
    "old weight_norm": lambda net: nn.utils.weight_norm(net.conv),
    "to(float64)": lambda net: net.to(torch.float64),
    "half()": lambda net: net.half(),
    "data assigned": lambda net: setattr(net.conv.weight, "data", net.conv.weight.data.clone()),
}  # fmt: skip

for how, change in REPLACED.items():
    for row in (0, 1):
        case("replaced parameters", f"{how}, copy {row}", at_step(lambda o, f=change, r=row: f(o.replicas.copies[r])))
case("replaced parameters", "a copy replaced", at_step(lambda o: o.replicas.copies.__setitem__(1, Net())))
case(
    "replaced parameters",
    "under a compute_dtype",
    at_step(lambda o: assign(o.replicas.theta), compute_dtype=torch.bfloat16),
)


case("replaced parameters", "frozen in one copy", at_step(lambda o: o.replicas.eta.gain.requires_grad_(False)))
case("replaced parameters", "a copy moved", at_step(lambda o: o.replicas.eta.double()))


def put(name: str, value: Any, row: int = 0) -> Callable[[hta.CoupledOptimizer], None]:
    def change(optimizer: hta.CoupledOptimizer) -> None:
        optimizer.state[optimizer.replicas.trained[row][0]][name] = value

    return change


for value in (torch.zeros(1), torch.zeros(3, 3), "nope", 3.0, torch.zeros(8, 1, 3, 3, dtype=torch.complex64)):
    case("state", f"momentum {str(value)[:20]!r}", at_step(put("momentum_buffer", value)))
    case("state", f"exp_avg {str(value)[:20]!r}", at_step(put("exp_avg", value, 1), proposal=hta.AdamW()))
for value in (7, torch.tensor(7.0), "nope", None, torch.zeros(2)):
    case("state", f"step {str(value)[:20]!r} of one", at_step(put("step", value), proposal=hta.AdamW()))
case("state", "one entry gone", at_step(lambda o: o.state.popitem(), proposal=hta.AdamW()))


def moved(change: Callable[[hta.Replicas], Any], **options: Any) -> Callable[[], Any]:
    def call() -> None:
        optimizer = trained(**options)
        unchanged(lambda: change(optimizer.replicas), [*buffers_of(optimizer), *optimizer.replicas.parameters()])

    return call


for what, change in {
    "complex64": lambda r: r.to(torch.complex64),
    "float8": lambda r: r.to(torch.float8_e4m3fn),
    "the meta device": lambda r: r.to("meta"),
    "channels last": lambda r: r.to(memory_format=torch.channels_last),
    "shared memory": lambda r: r.share_memory(),
    "an unknown device": lambda r: r.to("nope"),
}.items():
    case("replicas", f"moved to {what}", moved(change))
for what, change in {
    "float16": lambda r: r.half(), "float32": lambda r: r.float(), "bfloat16": lambda r: r.bfloat16(),
    "float64": lambda r: r.double(),
}.items():  # fmt: skip
    case("replicas", f"{what} with a compute_dtype", moved(change, compute_dtype=torch.bfloat16))


def rebind_after(change: Callable[[Any], Any]) -> Callable[[], Any]:
    def call() -> None:
        optimizer = trained()
        change(optimizer.replicas.eta)
        unchanged(optimizer.replicas.rebind, buffers_of(optimizer))

    return call


for how, change in {
    "another shape": lambda net: setattr(net, "fc", nn.Linear(16, 3)),
    "another name": lambda net: setattr(net, "fc", Wrapped(net.fc)),
    "a parameter gone": lambda net: setattr(net.conv, "bias", None),
    "a parameter more": lambda net: net.add_module("head", nn.Linear(2, 2)),
    "complex values": lambda net: setattr(net.fc, "bias", nn.Parameter(net.fc.bias.detach().to(torch.complex64))),
    "another device": lambda net: setattr(net.fc, "bias", nn.Parameter(net.fc.bias.detach().to("meta"))),
}.items():
    case("replaced parameters", f"rebind() with {how}", rebind_after(change))

# ------------------------------------------------------------------------------------------------------------------- ops


def pair(n: int = 2100, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    names = ("theta", "eta", "grad_theta", "grad_eta", "momentum_theta", "momentum_eta", "anchor")
    tensors = {name: torch.randn(n, dtype=dtype) for name in names}
    return {**tensors, "labels": torch.zeros(n, dtype=torch.uint8), "L": 0.1, "lr": 0.1, "momentum": 0.9}


def general(n: int = 2100, m: int = 3) -> dict[str, Any]:
    copies, grads, states = (torch.randn(m, n) for _ in range(3))
    settings = {"proposal": hta.SGD(0.1, 0.9), "coupling": hta.EMA()}
    return {"copies": copies, "grads": grads, "states": states, "anchor": torch.randn(n), "labels": None, **settings}


def penalty(n: int = 2100) -> dict[str, Any]:
    return {k: v for k, v in pair(n).items() if k in ("theta", "eta", "anchor", "labels", "L")}


def accumulate(n: int = 2100) -> dict[str, Any]:
    return {
        k: v for k, v in pair(n).items() if k in ("grad_theta", "grad_eta", "theta", "eta", "anchor", "labels", "L")
    }


OPS: dict[str, tuple[Callable[..., Any], Callable[[], dict[str, Any]]]] = {
    "homotopy_step_": (hta.homotopy_step_, pair),
    "coupled_step_": (hta.coupled_step_, general),
    "homotopy_penalty": (hta.homotopy_penalty, penalty),
    "homotopy_penalty_accumulate_": (hta.homotopy_penalty_accumulate_, accumulate),
}


def op(name: str, **changed: Any) -> Callable[[], Any]:
    """A call of an op with some arguments changed: by values, or by functions of all arguments."""

    def call() -> Any:
        function, make = OPS[name]
        arguments = make()
        arguments |= {k: v(arguments) if callable(v) and not isinstance(v, type) else v for k, v in changed.items()}
        held = [t for v in arguments.values() for t in (v if isinstance(v, list | tuple) else [v])]
        return unchanged(lambda: function(**arguments), held)

    return call


def same(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda arguments: arguments[name]


def overlapping(first: str, second: str, shift: int = 100) -> dict[str, Callable[[dict[str, Any]], Any]]:
    """Two arguments that are windows of one tensor."""
    room = torch.randn(2100 + shift)
    return {first: lambda arguments: room[:2100], second: lambda arguments: room[shift:]}


def stats_in(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda arguments: arguments[name].view(torch.float64)[:4]


SHARED = [
    ("eta", "theta"), ("grad_theta", "theta"), ("grad_eta", "theta"), ("momentum_theta", "theta"), ("momentum_eta", "eta"),
    ("anchor", "theta"), ("anchor", "eta"), ("momentum_theta", "grad_theta"), ("momentum_eta", "grad_theta"),
    ("momentum_eta", "momentum_theta"), ("anchor", "momentum_eta"),
]  # fmt: skip
for one, other in SHARED:
    case("shared memory", f"homotopy_step_: {one} is {other}", op("homotopy_step_", **{one: same(other)}))
    case("shared memory", f"homotopy_step_: {one} overlaps {other}", op("homotopy_step_", **overlapping(one, other)))
for name in ("theta", "momentum_eta", "grad_theta", "anchor"):
    case("shared memory", f"homotopy_step_: stats in {name}", op("homotopy_step_", stats=stats_in(name)))
for low in ("low_theta", "low_eta"):
    half = {"grad_theta": torch.randn(2100).bfloat16(), "grad_eta": torch.randn(2100).bfloat16()}
    lows = {"low_theta": torch.zeros(2100).bfloat16(), "low_eta": torch.zeros(2100).bfloat16()}
    for grad in half:
        case(
            "shared memory",
            f"homotopy_step_: {low} is {grad}",
            op("homotopy_step_", **half, **{**lows, low: half[grad]}),
        )
case("shared memory", "homotopy_step_: low_eta is low_theta",
     op("homotopy_step_", **half, low_theta=lows["low_theta"], low_eta=lows["low_theta"]))  # fmt: skip
case("shared memory", "homotopy_step_: labels in theta",
     op("homotopy_step_", labels=lambda a: a["theta"].zero_().view(torch.uint8)[:2100]))  # fmt: skip
case("shared memory", "homotopy_step_: grad_scale in theta",
     op("homotopy_step_", grad_scale=lambda a: a["theta"].fill_(2.0)[5:6]))  # fmt: skip
case("shared memory", "homotopy_step_: found_inf in eta", op("homotopy_step_", found_inf=lambda a: a["eta"][:1]))
for name in ("copies", "grads", "states"):
    expanded = lambda a: torch.randn(2100).expand(3, -1)  # noqa: E731
    if name != "grads":
        case("shared memory", f"coupled_step_: {name} expanded", op("coupled_step_", **{name: expanded}))
    case("shared memory", f"coupled_step_: anchor in {name}", op("coupled_step_", anchor=lambda a, n=name: a[n][1]))
case(
    "shared memory",
    "coupled_step_: a copy twice",
    op("coupled_step_", copies=lambda a: [a["copies"][i] for i in (0, 1, 0)]),
)
case("shared memory", "coupled_step_: states are grads", op("coupled_step_", states=same("grads")))
case("shared memory", "coupled_step_: states are copies", op("coupled_step_", states=same("copies")))
case("shared memory", "coupled_step_: a partly shared state",
     op("coupled_step_", states=lambda a: [a["states"][0], a["grads"][2], a["states"][2]]))  # fmt: skip
case("shared memory", "coupled_step_: AdamW's two buffers are one",
     op("coupled_step_", states=lambda a: [a["states"]] * 2, proposal=hta.AdamW()))  # fmt: skip
for one, other in [
    ("grad_eta", "grad_theta"),
    ("grad_theta", "theta"),
    ("grad_eta", "theta"),
    ("grad_theta", "anchor"),
]:
    case("shared memory", f"accumulate_: {one} is {other}", op("homotopy_penalty_accumulate_", **{one: same(other)}))
    case("shared memory", f"accumulate_: {one} overlaps {other}",
         op("homotopy_penalty_accumulate_", **overlapping(one, other)))  # fmt: skip

SCALES = {"0": 0.0, "negative": -2.0, "NaN": math.nan, "inf": math.inf, "tiny": 1e-320, "small": 1e-40, "huge": 1e300}
for what, value in SCALES.items():
    for form, scale in (("float", value), ("tensor", torch.tensor(value, dtype=torch.float64))):
        for name in ("homotopy_step_", "coupled_step_"):
            case("grad_scale", f"{name}: {what}, a {form}", op(name, grad_scale=scale))
    case("grad_scale", f"optimizer: {what}",
         at_step(lambda o, v=value: setattr(o, "grad_scale", torch.tensor(v, dtype=torch.float64))))  # fmt: skip
for what, value in {**NO_NUMBERS, "two": torch.ones(2), "int64": torch.tensor(2)}.items():
    if value is not None:
        case("grad_scale", f"homotopy_step_: {what}", op("homotopy_step_", grad_scale=value))
        case("grad_scale", f"homotopy_step_: found_inf {what}", op("homotopy_step_", found_inf=value))

for name in ("lr", "L", "momentum", "weight_decay"):
    for what, value in (NO_NUMBERS | BEYOND).items():
        case("op settings", f"homotopy_step_: {name} {what}", op("homotopy_step_", **{name: value}))
for name in ("homotopy_penalty", "homotopy_penalty_accumulate_"):
    for what, value in (NO_NUMBERS | BEYOND | {"0": 0.0, "inf": math.inf}).items():
        case("op settings", f"{name}: L {what}", op(name, L=value))
for what, value in {"a number": 1, "a string": "yes", "None": None}.items():
    case("op settings", f"homotopy_step_: nesterov {what}", op("homotopy_step_", nesterov=value))
    case("op settings", f"homotopy_step_: skip_nonfinite {what}", op("homotopy_step_", skip_nonfinite=value))
    case("op settings", f"homotopy_step_: mode {what}", op("homotopy_step_", mode=value))
    case("op settings", f"coupled_step_: proposal {what}", op("coupled_step_", proposal=value))
    case("op settings", f"coupled_step_: coupling {what}", op("coupled_step_", coupling=value))
for what, value in {"0": 0, "negative": -1, "1.5": 1.5, "a string": "1", "None": None, "a flag": True}.items():
    case("op settings", f"coupled_step_: step {what}", op("coupled_step_", step=value))
for name in ("copies", "grads", "states", "anchor", "low"):
    for what, value in {"a number": 3.0, "a string": "x", "a list of strings": ["a", "b", "c"]}.items():
        case("op settings", f"coupled_step_: {name} {what}", op("coupled_step_", **{name: value}))
for name in ("theta", "eta", "grad_theta", "grad_eta", "momentum_theta", "anchor", "labels", "stats"):
    for what, value in {"a number": 3.0, "a string": "x", "sparse": torch.zeros(2100).to_sparse()}.items():
        case("op settings", f"homotopy_step_: {name} {what}", op("homotopy_step_", **{name: value}))

LABELS = {"3": torch.full((2100,), 3, dtype=torch.uint8), "255 at the end": torch.zeros(2100, dtype=torch.uint8)}
LABELS["255 at the end"][-1] = 255
for what, value in LABELS.items():
    for name in ("homotopy_step_", "homotopy_penalty", "homotopy_penalty_accumulate_"):
        case("labels", f"{name}: {what}", op(name, labels=value))
case("labels", "coupled_step_: 4", op("coupled_step_", labels=torch.full((2100,), 4, dtype=torch.uint8)))
for dtype in (torch.int64, torch.bool, torch.float32):
    case("labels", f"homotopy_step_: {dtype}", op("homotopy_step_", labels=torch.zeros(2100, dtype=dtype)))

HUGE: dict[str, dict[str, Any]] = {
    "lr": {"lr": 1e308}, "weight_decay": {"weight_decay": 1e39}, "inf weight_decay": {"weight_decay": math.inf},
    "explicit at 1e-38": {"L": 1e-38, "mode": "explicit"}, "explicit at 1e38": {"L": 1e38, "mode": "explicit"},
}  # fmt: skip
for what, values in HUGE.items():
    case("overflow", f"homotopy_step_: {what}", op("homotopy_step_", **values))
for L in (1e-38, 1e-30, 1e38, 1e308):
    for name in ("homotopy_penalty", "homotopy_penalty_accumulate_"):
        case("overflow", f"{name}: L {L}", op(name, L=L))
for coupling in (hta.Explicit(1e-38), hta.Toward(1e300, mode="explicit"), hta.Average(1e300)):
    case("overflow", f"coupled_step_: {coupling}", op("coupled_step_", coupling=coupling, proposal=hta.SGD(1e300, 0.9)))
    case(
        "overflow",
        f"optimizer: {coupling}",
        lambda c=coupling: hta.CoupledOptimizer(hta.Replicas(Net()), hta.SGD(1e300), c),
    )

COMPLEX = (torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2, torch.int32, torch.bool)
for dtype in COMPLEX:
    for name in ("theta", "eta", "grad_theta", "grad_eta", "momentum_eta", "anchor"):
        case("dtypes", f"homotopy_step_: {name} {dtype}",
             op("homotopy_step_", **{name: lambda a, d=dtype, n=name: a[n].to(d)}))  # fmt: skip
    every = {k: (lambda a, d=dtype, n=k: a[n].to(d)) for k in ("theta", "eta", "anchor")}
    case("dtypes", f"homotopy_penalty: all {dtype}", op("homotopy_penalty", **every))
for dtype in COMPLEX[:3]:
    case(
        "dtypes",
        f"Replicas: {dtype}",
        lambda d=dtype: hta.Replicas(nn.ParameterList([nn.Parameter(torch.ones(4).to(d))]), partition={}),
    )
    case("dtypes", f"Replicas: float32 and {dtype}",
         lambda d=dtype: hta.Replicas(nn.ParameterList([nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4).to(d))]), partition={}))  # fmt: skip
    case("dtypes", f"Replicas: an anchor of {dtype}",
         lambda d=dtype: hta.Replicas(Net(), anchor=torch.zeros(hta.Replicas(Net()).layout.numel).to(d)))  # fmt: skip

# -------------------------------------------------------------------------------------------------------------- settings

SETTINGS: list[tuple[Any, dict[str, Any], Any]] = [
    (hta.SGD, {"lr": 0.1, "momentum": 0.9}, hta.SGD),
    (hta.AdamW, {}, hta.AdamW),
    *((c, {}, c) for c in (hta.Homotopy, hta.Explicit, hta.EMA, hta.Lookahead, hta.Elastic, hta.Parle, hta.Toward, hta.Average)),
]  # fmt: skip
for make, good, kind in SETTINGS:
    for f in fields(kind):
        if f.type is float:
            for what, value in (NO_NUMBERS | BEYOND).items():
                case(
                    "settings",
                    f"{kind.__name__}: {f.name} {what}",
                    lambda m=make, g=good, n=f.name, v=value: m(**{**g, n: v}),
                )
        elif f.type is bool:
            for value in ("yes", None, 1):
                case(
                    "settings",
                    f"{kind.__name__}: {f.name} {value!r}",
                    lambda m=make, g=good, n=f.name, v=value: m(**{**g, n: v}),
                )
        elif f.name in ("every", "mode"):
            for value in ("2", None, 0, 1.5, True, [1]):
                case(
                    "settings",
                    f"{kind.__name__}: {f.name} {value!r}",
                    lambda m=make, g=good, n=f.name, v=value: m(**{**g, n: v}),
                )
for value in ("ab", None, 0.9, (0.9,), (0.9, "x"), (0.9, None), (True, 0.9), (0.9, 1.0), (math.nan, 0.9)):
    case("settings", f"AdamW: betas {value!r}", lambda v=value: hta.AdamW(betas=v))


def changed(name: str, value: Any, **options: Any) -> Callable[[], Any]:
    return at_step(lambda o: o.param_groups[-1].__setitem__(name, value), **options)


ADAMW = {"proposal": hta.AdamW()}
for name in ("lr", "momentum", "weight_decay", "L"):
    for what, value in (NO_NUMBERS | BEYOND | {"NaN tensor": torch.tensor(math.nan), "two": torch.ones(2)}).items():
        case("changed settings", f"{name} {what}", changed(name, value))
for name, values in {
    "betas": (None, 0.9, ("a", 0.9), (0.9, math.nan)),
    "eps": ("1", None, 0.0, math.nan),
    "lr": (1e308, "1"),
}.items():
    for value in values:
        case("changed settings", f"AdamW's {name} {value!r}", changed(name, value, **ADAMW))
for name, value in [
    ("lr", 1e308), ("weight_decay", 1e39), ("weight_decay", math.inf), ("nesterov", "yes"), ("nesterov", None),
    ("maximize", 1), ("every", 0), ("every", "1"), ("dampening", 0.5),
]:  # fmt: skip
    case("changed settings", f"{name} {value!r}", changed(name, value))
case("changed settings", "Explicit's L 1e-38", changed("L", 1e-38, coupling=hta.Explicit(1.0)))
case("changed settings", "Explicit's L 0", changed("L", 0.0, coupling=hta.Explicit(1.0)))
case("changed settings", "Elastic's alpha above 1/copies", changed("alpha", 0.9, coupling=hta.Elastic(0.1)))
case("changed settings", "Elastic's mode", changed("mode", "sideways", coupling=hta.Elastic(0.1)))
case("changed settings", "Elastic's mode in one group",
     changed("mode", "explicit", coupling=hta.Elastic(0.1), groups=[{"params": ["gain"]}]))  # fmt: skip
case("changed settings", "one group's lr",
     changed("lr", "0.1", groups=[{"params": ["gain"], "lr": 0.2}]))  # fmt: skip
for what, value in (NO_NUMBERS | BEYOND).items():
    case("changed settings", f"optimizer.L {what}", lambda v=value: setattr(trained(), "coupling", hta.Homotopy(v)))
    case(
        "changed settings",
        f"plan {what}",
        lambda v=value: (o := trained()) and unchanged(lambda: o.plan([0.1, v]), buffers_of(o)),
    )
case("changed settings", "plan of nothing", lambda: trained().plan([]))
case("changed settings", "plan from a string", lambda: trained().plan([0.1], "0"))

# ---------------------------------------------------------------------------------------------------------- constructors

for what, value in {"a string": "net", "None": None, "a number": 3, "a class": nn.Linear}.items():
    case("partitions", f"conv_blocks of {what}", lambda v=value: Partition.conv_blocks(v))
    case("partitions", f"layer_blocks of {what}", lambda v=value: Partition.layer_blocks(v))
    case("partitions", f"random of {what}", lambda v=value: Partition.random(v))
    case("replicas", f"of {what}", lambda v=value: hta.Replicas(v))
for maker in ("conv_blocks", "layer_blocks", "random", "hashed", "none", "auto"):
    for value in (0, -1, 256, 1.5, "2", None, True):
        case(
            "partitions", f"{maker}: blocks {value!r}", lambda k=maker, v=value: getattr(Partition, k)(Net(), blocks=v)
        )
    for value in ("head", 3, ["conv"]):
        case("partitions", f"{maker}: part {value!r}", lambda k=maker, v=value: getattr(Partition, k)(Net(), v))
for value in ("0.5", True, [0.5], -0.1, 1.1, math.nan):
    case("partitions", f"random: p {value!r}", lambda v=value: Partition.random(Net(), p=v))
for value in ("0", None, 1.5, True, 2**70):
    case("partitions", f"random: seed {value!r}", lambda v=value: Partition.random(Net(), seed=v))
    case("partitions", f"hashed: seed {value!r}", lambda v=value: Partition.hashed(Net(), seed=v))
for value in ("0", 1.5, True, 2**70):
    case(
        "partitions",
        f"resample {value!r}",
        lambda v=value: (p := Partition.hashed(Net())) and unchanged(lambda: p.resample(v), [p.seed]),
    )
for value in (
    "1",
    None,
    1.5,
    True,
    3,
    -1,
    257,
    torch.tensor(257),
    torch.tensor(1.5),
    torch.tensor(math.nan),
    torch.tensor(1j),
):
    case("partitions", f"own: {value!r}", lambda v=value: Partition.own(Net(), {"gain": v}))
for value in (3, None, "labels", ["gain"]):
    case("partitions", f"own of {value!r}", lambda v=value: Partition.own(Net(), v))
    case("replicas", f"partition {value!r}", lambda v=value: hta.Replicas(Net(), partition=v))
for value in (3, None, "labels", [0, 1], torch.zeros(4), torch.zeros(2, 2, dtype=torch.uint8)):
    case("partitions", f"of labels {value!r}", lambda v=value: Partition(v))
case("partitions", "of labels, blocks '2'", lambda: Partition(torch.zeros(4, dtype=torch.uint8), blocks="2"))

for value in (0, 33, -1, 1.5, "2", True):
    case("replicas", f"copies {value!r}", lambda v=value: hta.Replicas(Net(), v))
for value in (3, None, True, "nope", ["init"], {}, {"gain": torch.ones(2)}, {"conv.weight": 3}, torch.zeros(3)):
    case("replicas", f"anchor {value!r}", lambda v=value: hta.Replicas(Net(), anchor=v))
for value in (3, None, True, "nope", [], [3], ["copy"], [nn.Linear(1, 1)], [Net(torch.float64)]):
    case("replicas", f"start {str(value)[:40].splitlines()[0]!r}", lambda v=value: hta.Replicas(Net(), start=v))
for name in ("communicate", "master_format", "anchor_format"):
    for value in ("pigeon", "", None, 3, [], ["full"], {}):
        case("replicas", f"{name} {value!r}", lambda n=name, v=value: hta.Replicas(Net(), **{n: v}))
for value in ("bfloat16", 16, torch.float64, torch.complex64, torch.float8_e4m3fn, torch.int8):
    case("replicas", f"compute_dtype {value!r}", lambda v=value: hta.Replicas(Net(), compute_dtype=v))


def shared_parameters() -> None:
    one, other = Net(), Net()
    other.fc, other.tied = one.fc, one.tied
    unchanged(lambda: hta.Replicas(one, start=[other]), one.parameters())


def loaded(change: Callable[[dict[str, Any]], Any]) -> Callable[[], Any]:
    def call() -> None:
        optimizer = trained()
        state = copy.deepcopy(optimizer.replicas.state_dict())
        for name, value in state.items():
            if name != "_extra_state":
                value.zero_()
        change(state)
        unchanged(lambda: optimizer.replicas.load_state_dict(state), buffers_of(optimizer))

    return call


for how, change in {
    "a copy less": lambda state: [state.pop(name) for name in [*state] if name.startswith("copies.1.")],
    "a copy more": lambda state: state.update({"copies.2.fc.bias": state["copies.1.fc.bias"]}),
    "a name less": lambda state: state.pop("copies.1.fc.bias"),
    "a name more": lambda state: state.update({"copies.1.more": torch.zeros(1)}),
    "another shape": lambda state: state.update({"copies.1.fc.bias": torch.zeros(1)}),
    "no anchor": lambda state: state.pop("anchor"),
    "an anchor of one": lambda state: state.update(anchor=torch.zeros(1)),
    "another partition": lambda state: state["_extra_state"].add_(torch.tensor([1, 0])),
    "no partition": lambda state: state.pop("_extra_state"),
    "the partition of half a seed": lambda state: state.update(_extra_state=state["_extra_state"][:1]),
    "a partition that is no tensor": lambda state: state.update(_extra_state="conv_blocks"),
}.items():
    case("replicas", f"load_state_dict with {how}", loaded(change))


def lazy() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 1, 1), nn.LazyLinear(4))


for what, make in {"on the meta device": lambda: Net().to("meta"), "lazy": lazy}.items():
    case("replicas", f"a model {what}", lambda m=make: hta.Replicas(m()))
for value in (3, "Net", Net(), lambda: None, lambda: nn.Linear(1, 1), lambda: Net(torch.float64)):
    for options in ({"start": "independent"}, {"anchor": "random"}):
        case("replicas", f"factory {str(value)[:12]!r} for {options}",
             lambda v=value, o=options: hta.Replicas(Net(), factory=v, **o))  # fmt: skip
the_same = Net()
case("replicas", "a factory of one module",
     lambda: hta.Replicas(Net(), copies=3, start="independent", factory=lambda: the_same))  # fmt: skip
case("replicas", "start shares parameters", shared_parameters)
case("replicas", "no trainable parameter", lambda: hta.Replicas(Net().requires_grad_(False)))
case("replicas", "two dtypes", lambda: hta.Replicas(nn.Sequential(nn.Conv2d(1, 1, 1), nn.Linear(1, 1).double())))

case("optimizers", "over parameters", lambda: hta.HomotopySGD(Net().parameters(), 0.1))
for option in ("foreach", "fused", "dampening", "differentiable", "betas"):
    case(
        "optimizers",
        f"HomotopySGD with {option}",
        lambda o=option: hta.HomotopySGD(hta.Replicas(Net()), 0.1, **{o: True}),
    )
for value in (None, 3, "optimizer", nn.Linear(1, 1)):
    case(
        "schedules",
        f"CouplingScheduler of {str(value)[:10]}",
        lambda v=value: hta.CouplingScheduler(v, L=lambda e: 1.0),
    )
for options in (
    {},
    {"L": 0.1},
    {"L": None},
    {"l": lambda e: 0.1},
    {"lr": 0.1},
    {"decay": lambda e: 0.1},
    {"params": lambda e: []},
):
    case("schedules", f"CouplingScheduler with {[*options]} {[*map(type, options.values())]}",
         lambda o=options: hta.CouplingScheduler(trained(), **o))  # fmt: skip
case("schedules", "CouplingScheduler over torch's SGD",
     lambda: hta.CouplingScheduler(torch.optim.SGD([torch.zeros(1)], 0.1), L=lambda e: 1.0))  # fmt: skip
for value in (-1, 1.5, None, "1"):
    case("schedules", f"CouplingScheduler loads epoch {value!r}",
         lambda v=value: hta.CouplingScheduler(trained(), L=lambda e: 1.0).load_state_dict({"epoch": v}))  # fmt: skip
for value in (-1.0, float("nan"), "x", None):
    case(
        "schedules",
        f"CouplingScheduler sets {value!r}",
        at_step(lambda o, v=value: hta.CouplingScheduler(o, L=lambda e: v)),
    )
for value in ("replicas", None, 3, nn.Linear(1, 1)):
    case("optimizers", f"over {str(value)[:20]}", lambda v=value: hta.CoupledOptimizer(v, hta.SGD(0.1), hta.Homotopy()))
    case("optimizers", f"HomotopySGD over {str(value)[:20]}", lambda v=value: hta.HomotopySGD(v, 0.1))
for value in ("SGD", None, 0.1, hta.SGD, hta.Homotopy(), torch.optim.SGD):
    case(
        "optimizers",
        f"proposal {value!r}"[:60],
        lambda v=value: hta.CoupledOptimizer(hta.Replicas(Net()), v, hta.Homotopy()),
    )
for value in ("Homotopy", None, 0.1, hta.Homotopy, hta.SGD(0.1)):
    case(
        "optimizers",
        f"coupling {value!r}"[:60],
        lambda v=value: hta.CoupledOptimizer(hta.Replicas(Net()), hta.SGD(0.1), v),
    )
for value in ("4bit", None, 3, [], ["full"], {}):
    case(
        "optimizers",
        f"state_format {value!r}",
        lambda v=value: hta.HomotopySGD(hta.Replicas(Net()), 0.1, state_format=v),
    )
for option in ("skip_nonfinite", "capturable"):
    for value in ("yes", None, 1):
        case(
            "optimizers",
            f"{option} {value!r}",
            lambda n=option, v=value: hta.HomotopySGD(hta.Replicas(Net()), 0.1, **{n: v}),
        )
for name in ("lr", "momentum", "weight_decay", "L"):
    for what, value in (NO_NUMBERS | BEYOND).items():
        case(
            "optimizers",
            f"HomotopySGD: {name} {what}",
            lambda n=name, v=value: hta.HomotopySGD(hta.Replicas(Net()), **{"lr": 0.1, n: v}),
        )
        case("optimizers", f"a group's {name} {what}",
             lambda n=name, v=value: hta.HomotopySGD(hta.Replicas(Net()), 0.1, groups=[{"params": ["gain"], n: v}]))  # fmt: skip
for value in (
    "gain",
    3,
    {"params": ["gain"]},
    [3],
    ["gain"],
    [{}],
    [{"params": 3}],
    [{"params": [3]}],
    [{"params": None}],
    [{"params": []}],
):
    case("optimizers", f"groups {value!r}", lambda v=value: hta.HomotopySGD(hta.Replicas(Net()), 0.1, groups=v))
for value in ("both", -1, 2, None, 1.5, True):
    case("optimizers", f"torch_state_dict of {value!r}", lambda v=value: trained().torch_state_dict(v))

for what, value in (NO_NUMBERS | BEYOND).items():
    case("settings", f"tables.implicit: L {what}", lambda v=value: hta.tables.implicit(v, 0.1))
    case("settings", f"tables.implicit: lr {what}", lambda v=value: hta.tables.implicit(0.1, v))
    case("settings", f"tables.implicit: copies {what}", lambda v=value: hta.tables.implicit(0.1, 0.1, v))
    case("schedules", f"constant {what}", lambda v=value: schedule.constant(v))
    case("schedules", f"Schedule of {what}", lambda v=value: schedule.Schedule((v,)))
    for i, name in enumerate(("start", "stop", "step")):
        case(
            "schedules",
            f"linear: {name} {what}",
            lambda i=i, v=value: schedule.linear(*[v if i == j else x for j, x in enumerate((0.1, 0.05, 0.01))]),
        )
    for i, name in enumerate(("start", "stop", "factor")):
        case(
            "schedules",
            f"geometric: {name} {what}",
            lambda i=i, v=value: schedule.geometric(*[v if i == j else x for j, x in enumerate((0.1, 0.05, 0.5))]),
        )
for value in (0, -1, 1.5, "2", None, True):
    case("schedules", f"{value!r} epochs", lambda v=value: schedule.constant(0.1, v))
    case("schedules", f"decoupled for {value!r}", lambda v=value: schedule.decoupled(v))
    case("schedules", f"linear, {value!r} a value", lambda v=value: schedule.linear(0.1, 0.05, 0.01, v))
    case("schedules", f"geometric, {value!r} a value", lambda v=value: schedule.geometric(0.1, 0.05, 0.5, v))
for value in (-1, 1.5, "0", None, True):
    case("schedules", f"epoch {value!r}", lambda v=value: schedule.constant(0.1)(v))
for value in ((), None, 0.1, "0.1"):
    case("schedules", f"Schedule({value!r})", lambda v=value: schedule.Schedule(v))
for value in (None, 0.1, (0.1,)):
    case("schedules", f"a sum with {value!r}", lambda v=value: schedule.constant(0.1) + v)
