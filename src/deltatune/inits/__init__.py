"""HOW a low-rank pair starts: one file per family of initialisations; none touches the base.

An init gets the frozen weight and says what A and B start as. Those whose product is not zero (PiSSA, OLoRA, …)
set `offset`: the adapter then carries a frozen copy (A0, B0) and applies s · (B A - B0 A0), so the model still
starts as the base, and disabling or unloading gives the base bit for bit.

Inits that start from data (EVA, CorDA, LoRA-GA) take what `deltatune.inits.data.prepare_init` left in the
configuration; see there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

import torch
from torch import Tensor

from deltatune.core.sharded import whole
from deltatune.core.weights import WeightRef
from deltatune.errors import ConfigError, hint


@dataclass(frozen=True)
class Request:
    """What an init is asked for.

    Attributes:
        init: its name, with an argument after it (`"pissa_niter_4"`).
        ref: the frozen weight. site: its path, for messages and prepared starts.
        r: rank. scale: s, by which B A is multiplied.
        config: the method's configuration, for the init's options.
    """

    init: str
    ref: WeightRef
    site: str
    r: int
    scale: float = 1.0
    config: Any = None

    @property
    def argument(self) -> str:
        """What follows the init's name: `"niter_4"`."""
        return find_init(self.init)[1]

    def weight(self) -> Tensor:
        """The base's numbers, `(*batch, out, in)` in float32; refuses a rank that they do not have.

        Raises:
            ConfigError: r is larger than the matrix, or the base has no numbers yet.
        """
        limit = min(self.ref.shape[-2:])
        if self.r > limit:
            raise ConfigError(
                f"init {self.init!r} takes r directions of the weight, but r={self.r} "
                f"and {self.site!r} has only {limit}; lower r, or give this module its own in rank_pattern"
            )
        if self.ref.param.is_meta:
            raise ConfigError(
                f"init {self.init!r} reads the base's numbers, and {self.site!r} is on "
                "the meta device; load the base first"
            )
        return whole(self.ref.load())


@dataclass(frozen=True)
class Start:
    """What a pair starts as: `a: (*batch, r, in)`, `b: (*batch, out, r)`, scale not included.

    Attributes:
        offset: the product is not zero at the start, so a frozen copy is subtracted.
        later: while loading, `a` and `b` hold no numbers yet; this computes them if the file lacks them.
        derivable: whether `later` gives what the file's writer had; otherwise a file without A0 and B0 is refused,
            with `advice`.
        freezes_b: B stays as it starts; only A trains.
    """

    a: Tensor
    b: Tensor
    offset: bool = False
    later: Later | None = None
    derivable: bool = True
    advice: str = ""
    freezes_b: bool = False


Make = Callable[[Request], Start]


@dataclass(frozen=True)
class Init:
    """A registered initialisation.

    Attributes:
        make: computes the start.
        check: refuses impossible options when the configuration is made: (configuration, argument) -> None.
        offset: `make` gives starts with `offset`. derivable: from the base alone, always with the same result.
        freezes_b: B stays as it starts.
        option: the configuration's field that holds its options. options: their dataclass.
        needs_data: it takes what `prepare_init` computed.
    """

    make: Make
    check: Callable[[Any, str], None] | None = None
    offset: bool = False
    derivable: bool = True
    freezes_b: bool = False
    option: str = ""
    options: type[Any] | None = None
    needs_data: bool = False


INITS: dict[str, Init] = {}


def register_init(name: str, **about: Any) -> Callable[[Make], Make]:
    """Makes `init_lora_weights=name` known; `name_niter_4` calls it with the argument `"niter_4"`."""

    def keep(make: Make) -> Make:
        INITS[name] = Init(make, **about)
        return make

    return keep


def find_init(name: str) -> tuple[Init, str]:
    """(the init, its argument) for a value of `init_lora_weights`.

    Raises:
        ConfigError: no init has this name.
    """
    if name in INITS:
        return INITS[name], ""
    for known in sorted(INITS, key=len, reverse=True):
        if name == known or name.startswith(f"{known}_"):
            return INITS[known], name[len(known) + 1 :]
    raise ConfigError(f"init_lora_weights {name!r} is unknown{hint(name, INITS)} (known: {', '.join(sorted(INITS))})")


def check_init(config: Any) -> None:
    """Reads `config.init_lora_weights` and turns dictionaries of options into their dataclasses.

    Raises:
        ConfigError: an unknown init, argument or option.
    """
    for init in INITS.values():
        if init.options is not None:
            setattr(config, init.option, _options(init, getattr(config, init.option)))
    init, argument = find_init(config.init_name)
    if argument and init.check is None:
        raise ConfigError(f"init_lora_weights {config.init_lora_weights!r} is unknown{hint(config.init_name, INITS)}")
    if init.check is not None:
        init.check(config, argument)


def _options(init: Init, value: Any) -> Any:
    if not value or init.options is None or isinstance(value, init.options):
        return value
    if not isinstance(value, dict):
        raise ConfigError(f"{init.option} must be a {init.options.__name__} or a dictionary, not {value!r}")
    names = list(init.options.__dataclass_fields__)
    for key in value:
        if key not in names:
            raise ConfigError(f"{init.option} has no option {key!r}{hint(key, names)}")
    return init.options(**value)


def options_of(config: Any, option: str, options: type[Any]) -> Any:
    """An init's options, the default ones if the configuration has none."""
    return getattr(config, option) or options()


# ---------------------------------------------------------------------- starting
_LOADING: ContextVar[bool] = ContextVar("deltatune_loading", default=False)


@contextlib.contextmanager
def loading() -> Iterator[None]:
    """Adapters built in the body are filled from a file at once, so that no start need be computed."""
    token = _LOADING.set(True)
    try:
        yield
    finally:
        _LOADING.reset(token)


def is_loading() -> bool:
    """Whether the tensors built now will be filled from a file: while loading, or on the meta device."""
    return _LOADING.get() or torch.empty(0).is_meta


class Later:
    """A start that is computed when a file turns out to lack it; computed once."""

    def __init__(self, make: Make, request: Request) -> None:
        self.make, self.request = make, request
        self.done: Start | None = None

    def __call__(self, which: str) -> Tensor:
        if self.done is None:
            self.done = self.make(self.request)
        return self.done.a if which == "a" else self.done.b


def start(request: Request) -> Start:
    """What the pair of one site starts as.

    Raises:
        ConfigError: the init does not go with this weight, rank or configuration.
    """
    init, _ = find_init(request.init)
    if is_loading():
        return _placeholder(init, request)
    _refuse_foreign_options(init, request.config)
    made = init.make(request)
    for name in ("offset", "freezes_b"):  # loading builds the same slots from what is registered alone
        if getattr(made, name) != getattr(init, name):
            raise ConfigError(f"init {request.init!r} gives a Start with {name}; say so to register_init too")
    return made


def _placeholder(init: Init, request: Request) -> Start:
    """Tensors of the right shapes for a file to fill."""
    *batch, out, inp = request.ref.shape
    if not init.offset:  # a file that lacks a factor gets LoRA's own start
        device = request.ref.device
        a, b = torch.empty(*batch, request.r, inp, device=device), torch.empty(*batch, out, request.r, device=device)
        return Start(a, b, freezes_b=init.freezes_b, later=Later(INITS["default"].make, request))
    a, b = torch.zeros(*batch, request.r, inp), torch.zeros(*batch, out, request.r)
    if request.ref.op.looks_up:
        # peft gives an embedding LoRA's own start whatever the init, so a file of its has nothing to subtract there
        return Start(a, b, offset=True, later=Later(_nothing, request))
    advice = (
        f"init {request.init!r} cannot be computed again, so the file must hold the A0 and B0 that are subtracted; in "
        "peft, save with path_initial_model_for_weight_conversion, which gives a plain LoRA"
    )
    later = None if init.needs_data else Later(init.make, request)
    return Start(a, b, offset=True, later=later, derivable=init.derivable, advice="" if init.derivable else advice)


def _nothing(request: Request) -> Start:
    *batch, out, inp = request.ref.shape
    return Start(torch.zeros(*batch, request.r, inp), torch.zeros(*batch, out, request.r), offset=True)


def _refuse_foreign_options(init: Init, config: Any) -> None:
    for name, other in INITS.items():
        if other.option and other.option != init.option and getattr(config, other.option, None):
            raise ConfigError(f"{other.option} is set, which only init_lora_weights={name!r} reads")


for _found in iter_modules(__path__):
    import_module(f"{__name__}.{_found.name}")
