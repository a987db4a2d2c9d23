"""WHERE a method goes: patterns, roles and presets -> (module, parameter, rows)."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torch import nn

from deltatune.core import fused, roles
from deltatune.core.edits import AdapterTensors
from deltatune.core.ops import LINEAR, TransposedOp, class_names, find_op
from deltatune.core.weights import Rows
from deltatune.errors import ConfigError, TargetError, hint

if TYPE_CHECKING:
    from deltatune.config import TargetedConfig

ALL_LINEAR = "all-linear"
MULTIHEAD = "torch.nn.modules.activation.MultiheadAttention"
EMBEDDING = "torch.nn.modules.sparse.Embedding"


@dataclass(frozen=True)
class Site:
    """One place of one method.

    Attributes:
        path: the module whose call is changed (the host).
        parameter: the weight, relative to the host; None for edits of the whole module.
        rows: the output rows, all if None.
        home: the module under which the adapter's tensors are named; the host if empty.
        file_path: `home` as checkpoints of peft write it, where that differs.
        tag: tells apart several weights (or row blocks) of one module: `lora_A_<tag>`.
        pattern: the pattern of the configuration that selected it.
    """

    path: str
    parameter: str | None = "weight"
    rows: Rows = None
    home: str = ""
    file_path: str = ""
    tag: str = ""
    pattern: str = ""

    @property
    def name(self) -> str:
        """The path that `rank_pattern` and the like are matched against."""
        return self.home or self.path

    @property
    def key(self) -> str:
        """Tells every weight of a configuration apart."""
        return f"{self.name}.{self.tag}" if self.tag else self.name


@dataclass
class TargetPlan:
    """What a configuration would touch, before anything is touched.

    Attributes:
        sites: every place, in the model's order.
        patterns: pattern -> paths it selected.
        tied: (module, parameter it shares its weight with) for adapted weights that are tied.
    """

    sites: list[Site]
    patterns: dict[str, list[str]] = field(default_factory=dict)
    tied: list[tuple[str, str]] = field(default_factory=list)


#: models whose modules neither come nor go now -> what a walk finds
_WALKED: ContextVar[dict[nn.Module, list[tuple[str, nn.Module]]] | None] = ContextVar("deltatune_walked", default=None)


@contextlib.contextmanager
def standing(model: nn.Module) -> Iterator[None]:
    """Runs the body under the promise that no module of the model's own comes or goes, so that one walk will do."""
    token = _WALKED.set({model: list(_walk(model))})
    try:
        yield
    finally:
        _WALKED.reset(token)


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The model's own modules with their paths, without anything an adapter has put there."""
    known = _WALKED.get()
    return iter(known[model]) if known is not None and model in known else _walk(model)


def _walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    stack: list[tuple[str, nn.Module]] = [("", model)]
    seen: set[int] = set()
    while stack:
        path, module = stack.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield path, module
        children = [
            (f"{path}.{name}" if path else name, child)
            for name, child in module._modules.items()
            if child is not None and not isinstance(child, AdapterTensors)
        ]
        stack.extend(reversed(children))


def base_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The model's own parameters with their names, tied ones once."""
    seen: set[int] = set()
    for path, module in base_modules(model):
        for name, param in module._parameters.items():
            if param is not None and id(param) not in seen:
                seen.add(id(param))
                yield (f"{path}.{name}" if path else name), param


def is_suffix(pattern: str, path: str) -> bool:
    """peft's rule for lists: the whole path, or its end at a dot."""
    return path == pattern or path.endswith(f".{pattern}")


def pattern_value(table: dict[str, Any], path: str, default: Any) -> Any:
    """The value for `path` in a `rank_pattern`-like table: a path, its end, or a regular expression."""
    for pattern, value in table.items():
        if re.fullmatch(rf"(.*\.)?({pattern})", path):
            return value
    return default


def check_patterns(table: Iterable[str], paths: Sequence[str], what: str) -> None:
    """Every key of a pattern table must select something."""
    for pattern in table:
        if not any(re.fullmatch(rf"(.*\.)?({pattern})", path) for path in paths):
            raise TargetError(f"{what} key {pattern!r} matches no adapted module{hint(pattern, paths)}")


# ---------------------------------------------------------------------- selecting modules
def select(
    patterns: str | Iterable[str], paths: Sequence[str], what: str, nearby: Sequence[str] = ()
) -> dict[str, list[str]]:
    """pattern -> paths; a list matches ends of paths, a string is a regular expression.

    Raises:
        TargetError: a pattern matches nothing; says the nearest names.
    """
    if isinstance(patterns, str):
        try:
            rule = re.compile(patterns)
        except re.error as error:
            raise ConfigError(f"{what} {patterns!r} is not a regular expression: {error}") from error
        found = {patterns: [p for p in paths if rule.fullmatch(p)]}
    else:
        found = {t: [p for p in paths if p.endswith(t) and is_suffix(t, p)] for t in sorted(patterns)}
    for pattern, hits in found.items():
        if not hits:
            leaves = {p.rpartition(".")[2]: None for p in nearby or paths}
            better = hint(pattern, [*leaves, *(nearby or paths)])
            if isinstance(patterns, str) and pattern in leaves:
                better = f"; a string is a regular expression over whole paths, and [{pattern!r}] matches their ends"
            raise TargetError(f"{what} {pattern!r} matches no module of this model{better}")
    return found


def layer_index(path: str, layers_pattern: str | Sequence[str] | None) -> int | None:
    """The number of the layer that `path` lies in; None outside layers."""
    if not layers_pattern:
        found = re.match(r".*?\.(\d+)\.", f".{path}.")
        return int(found.group(1)) if found else None
    names = [layers_pattern] if isinstance(layers_pattern, str) else layers_pattern
    for name in names:
        found = re.match(rf".*?\.{name}\.(\d+)\.", f".{path}.")
        if found:
            return int(found.group(1))
    return None


def in_layers(config: TargetedConfig, found: dict[str, list[str]]) -> dict[str, list[str]]:
    """Keeps what `layers_to_transform` allows."""
    wanted = config.layers_to_transform
    if wanted is None:
        if config.layers_pattern:
            raise ConfigError("layers_pattern says where layers are counted; it needs layers_to_transform")
        return found
    layers = {wanted} if isinstance(wanted, int) else set(wanted)
    index = {p: layer_index(p, config.layers_pattern) for hits in found.values() for p in hits}
    there = {i for i in index.values() if i is not None}
    if not there:
        raise TargetError(f"no target lies in numbered layers (layers_pattern={config.layers_pattern!r})")
    absent = sorted(layers - there)
    if absent:
        raise TargetError(
            f"layers_to_transform names layer {absent[0]}, but targets lie in layers {min(there)} to {max(there)}"
        )
    return {pattern: [p for p in hits if index[p] in layers] for pattern, hits in found.items()}


def excluded(config: TargetedConfig, paths: Sequence[str]) -> set[str]:
    """The paths `exclude_modules` takes away."""
    if not config.exclude_modules:
        return set()
    found = select(config.exclude_modules, paths, "exclude_modules")
    return {p for hits in found.values() for p in hits}


def output_layers(model: nn.Module) -> set[str]:
    """Paths of the layers that turn hidden states into the task's output (head, classifier)."""
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    paths = {path for path, module in base_modules(model) if module is head and head is not None}
    return paths | set(roles.head_modules(model))


def targets(model: nn.Module, config: TargetedConfig) -> dict[str, list[str]]:
    """pattern -> module paths, every rule of the configuration applied."""
    modules = dict(base_modules(model))
    paths = [p for p in modules if p]
    wanted = config.target_modules
    kinds = [p for p in paths if find_op(modules[p]) is not None or is_multihead(modules[p])]
    saved = set() if not config.modules_to_save else set(saved_modules(model, config))
    inside_saved = {p for p in paths if any(p == s or p.startswith(f"{s}.") for s in saved)} if saved else set()
    if wanted == ALL_LINEAR:
        skip = output_layers(model) | inside_saved
        found = {ALL_LINEAR: [p for p in kinds if p not in skip and is_linear(modules[p])]}
        if not found[ALL_LINEAR]:
            raise TargetError('target_modules="all-linear" finds no linear layer in this model')
    elif wanted is None:
        found = roles.default_targets(model, kinds)
    else:
        wanted = roles.todays_names(wanted, kinds) if not isinstance(wanted, str) else wanted
        found = select(wanted, paths, "target_modules", nearby=kinds)
    drop = excluded(config, paths) | inside_saved
    found = {pattern: [p for p in hits if p not in drop] for pattern, hits in found.items()}
    for pattern, hits in found.items():
        for path in hits:
            check_kind(model, modules, path, pattern)
    if not any(found.values()):
        raise TargetError(
            f"everything that target_modules {' and '.join(map(repr, found))} matches is taken away by "
            "exclude_modules or modules_to_save"
        )
    return in_layers(config, found)


def is_linear(module: nn.Module) -> bool:
    op = find_op(module)
    return type(op) in (type(LINEAR), TransposedOp) or is_multihead(module)


def is_multihead(module: nn.Module) -> bool:
    return MULTIHEAD in class_names(type(module))


def check_kind(model: nn.Module, modules: dict[str, nn.Module], path: str, pattern: str) -> None:
    module = modules[path]
    if find_op(module) is not None or is_multihead(module):
        return
    inside = [p for p in modules if p.startswith(f"{path}.") and find_op(modules[p]) is not None]
    better = f"; name one of its layers, for instance {inside[0]!r}" if inside else ""
    raise TargetError(
        f"target_modules {pattern!r} matches {path!r}, a {type(module).__name__}, which has no weight that a "
        f"delta can change{better}"
    )


# ---------------------------------------------------------------------- from modules to sites
def weight_sites(model: nn.Module, found: dict[str, list[str]]) -> list[Site]:
    """The sites of the selected modules' weights, in the model's order."""
    modules = dict(base_modules(model))
    order = {path: i for i, path in enumerate(modules)}
    sites: dict[tuple[str, str | None, str], Site] = {}
    for pattern, hits in found.items():
        for path in hits:
            for site in _sites_of(modules, path, pattern):
                sites.setdefault((site.path, site.parameter, site.tag), site)
    return sorted(sites.values(), key=lambda s: order[s.home or s.path])


def _sites_of(modules: dict[str, nn.Module], path: str, pattern: str) -> list[Site]:
    module = modules[path]
    parent = path.rpartition(".")[0]
    if is_multihead(module):
        if not module._qkv_same_embed_dim:
            raise TargetError(
                f"{path!r} has separate q, k and v widths, which adapters of nn.MultiheadAttention do not "
                "cover; adapt its other layers instead"
            )
        return [Site(path, "in_proj_weight", pattern=pattern), _out_proj(path, pattern)]
    if path and is_multihead(modules[parent]):
        return [_out_proj(parent, pattern)]  # MultiheadAttention reads this weight and never calls the layer
    return [Site(path, pattern=pattern)]


def _out_proj(path: str, pattern: str) -> Site:
    prefix = f"{path}." if path else ""
    return Site(
        path,
        "out_proj.weight",
        home=f"{prefix}out_proj",
        file_path=f"{prefix}base_layer.out_proj",
        pattern=pattern,
    )


def parameter_sites(model: nn.Module, patterns: Sequence[str]) -> list[Site]:
    """Parameters named by themselves: the fused `(experts, out, in)` weights of a mixture of experts.

    Raises:
        TargetError: a name matches no parameter, or one that is neither a matrix nor a stack of them.
    """
    shapes = {name: tuple(p.shape) for name, p in base_parameters(model)}
    chosen: dict[str, list[tuple[str, str]]] = {}
    for pattern in patterns:
        hits = [name for name in shapes if is_suffix(pattern, name)]
        if not hits:
            raise TargetError(f"target_parameters {pattern!r} matches no parameter{hint(pattern, shapes)}")
        for name in hits:
            if len(shapes[name]) not in (2, 3):
                raise TargetError(
                    f"target_parameters {pattern!r} matches {name!r} of shape {shapes[name]}; a matrix or a stack of "
                    "matrices is needed"
                )
            path, _, leaf = name.rpartition(".")
            chosen.setdefault(path, []).append((leaf, pattern))
    sites = []
    for path, found in chosen.items():
        order = [n for n in model.get_submodule(path)._parameters if n in dict(found)]
        for i, leaf in enumerate(order):  # peft nests one wrapper per parameter, the last outermost
            file_path = path + ".base_layer" * (len(order) - 1 - i)
            tag = "" if leaf == "weight" else leaf
            sites.append(Site(path, leaf, file_path=file_path, tag=tag, pattern=dict(found)[leaf]))
    return sites


def _check_parts(name: str, n: int) -> None:
    """Refuses parts of a projection that is not fused, or not of so many."""
    role = roles.role_of(name.rpartition(".")[2])
    if role in ("q", "k", "v"):
        raise ConfigError(f"enable_lora names parts of a fused projection, and {name!r} is not one; use target_modules")
    if role == "qkv" and n != len(fused.NAMES):
        raise ConfigError(f"enable_lora has {n} entries for {name!r}, which is q, k and v: give three")


def part_sites(model: nn.Module, sites: Sequence[Site], enabled: list[bool] | dict[str, list[bool]]) -> list[Site]:
    """Sites of fused projections split into the parts (q, k, v) that are enabled; others as they are."""
    table = enabled if isinstance(enabled, dict) else {site.name: enabled for site in sites}
    result = []
    for site in sites:
        flags = next((f for name, f in table.items() if is_suffix(name, site.name)), None)
        if flags is None:
            result.append(site)
            continue
        _check_parts(site.name, len(flags))
        names = fused.NAMES if len(flags) == 3 else [str(i) for i in range(len(flags))]
        rows = fused.parts(model, site.path, len(flags))
        result += [replace(site, rows=r, tag=n) for n, r, on in zip(names, rows, flags, strict=True) if on]
    return result


def tied_heads(model: nn.Module, path: str) -> list[str]:
    """Paths of other modules whose `weight` is the very parameter of the module at `path`."""
    weight = model.get_submodule(path)._parameters.get("weight")
    return [
        p for p, m in base_modules(model) if p != path and weight is not None and m._parameters.get("weight") is weight
    ]


def bias_sites(model: nn.Module, paths: Iterable[str] | None = None) -> list[Site]:
    """Every bias vector of the model, or of the modules at `paths`."""
    wanted = None if paths is None else set(paths)
    sites = []
    for path, module in base_modules(model):
        if wanted is not None and path not in wanted:
            continue
        for name, param in module._parameters.items():
            if param is not None and param.ndim == 1 and (name == "bias" or name.endswith("_bias")):
                sites.append(_bias_site(model, path, name))
    return sites


def is_norm(module: nn.Module) -> bool:
    """A normalisation layer (LayerNorm, any RMSNorm, GroupNorm, …) that has a gain."""
    own = [p for p in module._parameters.values() if p is not None]
    named = any("norm" in cls.__name__.lower() for cls in type(module).__mro__)
    inner = [m for m in module._modules.values() if m is not None and not isinstance(m, AdapterTensors)]
    return named and bool(own) and not inner and all(p.ndim == 1 for p in own)


def norm_sites(model: nn.Module, chosen: Callable[[str, nn.Module], bool] | None = None) -> list[Site]:
    """Every gain and bias of the model's normalisation layers.

    Args:
        chosen: whether the module at a path is one, where its class does not say so.
    """
    norms = [(p, m) for p, m in base_modules(model) if (is_norm(m) if chosen is None else chosen(p, m))]
    names = short_names(model, [path for path, _ in norms])
    vectors = [(path, leaf, p) for path, m in norms for leaf, p in m._parameters.items()]
    return [Site(path, leaf, pattern=names[path]) for path, leaf, p in vectors if p is not None and p.ndim == 1]


def short_names(model: nn.Module, paths: Sequence[str]) -> dict[str, str]:
    """path -> the shortest end of it that selects none of the model's other modules."""
    wanted = set(paths)
    others = [p for p, _ in base_modules(model) if p and p not in wanted]
    return {path: _short_name(path, others) for path in paths}


def vector_sites(
    model: nn.Module, config: TargetedConfig, candidates: Sequence[Site], what: str, chosen: bool = False
) -> list[Site]:
    """Those of the candidates that a configuration chooses, all if it names none; never those of saved modules.

    Args:
        what: a candidate, for messages (`"bias"`). chosen: `target_modules` has chosen among them already.

    Raises:
        TargetError: there are none, or a pattern matches only modules without.
    """
    names = {s.name for s in candidates}
    if not names:
        raise TargetError(f"no module of this {type(model).__name__} has a {what}, so nothing would train")
    paths = [p for p, _ in base_modules(model)]
    found = {what: [p for p in paths if p in names]}
    if config.target_modules and not chosen:
        found = select(config.target_modules, paths, "target_modules", nearby=sorted(names))
        for pattern, hits in found.items():
            if not names.intersection(hits):
                some = next(iter(names))
                raise TargetError(
                    f"target_modules {pattern!r} matches {hits[0]!r}, which has no {what}, as {some!r} has"
                )
    drop, copied = excluded(config, paths), saved_modules(model, config)
    inside = {p for hits in in_layers(config, found).values() for p in hits if p not in drop}
    sites = [s for s in candidates if s.name in inside]
    return [s for s in sites if not any(f"{s.name}.".startswith(f"{c}.") for c in copied)]


def trained_biases(model: nn.Module, config: TargetedConfig, names: Sequence[str], everywhere: bool) -> list[Site]:
    """Biases that train beside an adapter: all, or those of the adapted modules `names`; none of saved modules."""
    copied = saved_modules(model, config)
    sites = bias_sites(model, None if everywhere else names)
    return [s for s in sites if not any(f"{s.name}.".startswith(f"{c}.") for c in copied)]


def _bias_site(model: nn.Module, path: str, name: str) -> Site:
    parent = path.rpartition(".")[0]
    if path and is_multihead(model.get_submodule(parent)):
        return Site(parent, f"out_proj.{name}", home=path, pattern="bias")
    return Site(path, name, pattern="bias")


def saved_modules(model: nn.Module, config: TargetedConfig) -> list[str]:
    """Paths of the modules of which `modules_to_save` trains whole copies, outermost only.

    As in peft a name need not begin at a dot: `classifier` takes DistilBERT's fresh `pre_classifier` too.
    """
    names = config.modules_to_save or []
    paths = [p for p, _ in base_modules(model) if p]
    found: list[str] = []
    for name in names:
        hits = [p for p in paths if p.endswith(name)]
        if not hits and name not in config.optional_modules_to_save:
            leaves = {p.rpartition(".")[2]: None for p in paths}
            raise TargetError(
                f"modules_to_save {name!r} matches no module of this model{hint(name, [*leaves, *paths])}"
            )
        found.extend(hits)
    return [p for p in dict.fromkeys(found) if not any(p.startswith(f"{q}.") for q in found)]


def shortest_names(model: nn.Module, paths: Sequence[str], ends: Callable[[str, str], bool]) -> list[str]:
    """Names that select exactly these modules: the last parts of their paths where those suffice.

    Args:
        ends: whether a path is selected by a name.
    """
    leaves = list(dict.fromkeys(p.rpartition(".")[2] for p in paths))
    hits = [p for p, _ in base_modules(model) if p and any(ends(p, leaf) for leaf in leaves)]
    return leaves if set(hits) == set(paths) else list(dict.fromkeys(paths))


#: fewer explicit paths than this are written as they are (peft's limit)
FEW_PATHS = 20


def written_targets(model: nn.Module, config: TargetedConfig) -> Any:
    """`target_modules` as files hold it; see `TargetedConfig.written`."""
    if config.target_modules is not None and config.target_modules != ALL_LINEAR:
        return config.target_modules
    sites = config.sites(model)
    if config.target_modules is None:
        return {s.pattern for s in sites if is_suffix(s.pattern, s.path)} or None
    paths = {s.path for s in sites if s.pattern == ALL_LINEAR}
    others = [p for p, _ in base_modules(model) if p and p not in paths]
    return paths if len(paths) < FEW_PATHS else {_short_name(p, others) for p in paths}


def _short_name(path: str, others: Sequence[str]) -> str:
    """The shortest end of `path` that selects none of the others."""
    parts = path.split(".")
    names = (".".join(parts[-n:]) for n in range(1, len(parts) + 1))
    return next((name for name in names if not any(is_suffix(name, other) for other in others)), path)


def plan_targets(model: nn.Module, config: TargetedConfig) -> TargetPlan:
    """What `config` would touch in `model`; raises as `get_peft_model` would.

    Raises:
        TargetError: a pattern matches nothing or something that cannot be adapted.
    """
    sites = config.sites(model)
    patterns: dict[str, list[str]] = {}
    for site in sites:
        patterns.setdefault(site.pattern, []).append(site.name)
    for path in saved_modules(model, config):
        patterns.setdefault("modules_to_save", []).append(path)
    return TargetPlan(sites, patterns, tied_sites(model, sites))


def tied_sites(model: nn.Module, sites: Sequence[Site]) -> list[tuple[str, str]]:
    """Adapted weights whose storage another module uses too."""
    users: dict[int, list[str]] = {}
    for path, module in base_modules(model):
        for name, param in module._parameters.items():
            if param is not None:
                users.setdefault(id(param), []).append(f"{path}.{name}")
    tied = []
    for site in sites:
        if site.parameter is None:
            continue
        full = f"{site.path}.{site.parameter}"
        parent, _, leaf = site.parameter.rpartition(".")
        param = model.get_submodule(site.path).get_submodule(parent)._parameters.get(leaf)
        tied += [(full, other) for other in users.get(id(param), []) if other != full]
    return tied
