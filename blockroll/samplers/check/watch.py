"""Any torch sampler under given uniforms, and what it itself compares and sums."""

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from blockroll.errors import InvalidInput
from blockroll.kernels.rows.weights import inverse_cdf

_UNIFORM = ("rand", "rand_like")
_OTHER_DRAWS = ("randn", "randn_like", "randint", "randint_like", "randperm", "bernoulli", "normal")
_OTHER_DRAWS_IN_PLACE = ("uniform_", "exponential_", "normal_", "bernoulli_", "random_", "geometric_")
_LESS = ("lt", "__lt__", "le", "__le__")


class Watch(TorchFunctionMode):
    """While it is entered, torch draws from `uniforms`, in order; without them it draws as ever.

    `torch.rand` and `torch.rand_like` return the next of them; `torch.multinomial` of one sample takes one
    per row and returns the id whose interval holds it. So a sampler that brings its own randomness becomes
    a function of uniforms, and can be integrated. What `torch.multinomial` does with its weights is then
    not under test. Any other draw is an error, and so is one uniform too few; leaving with some unused is
    an error too, unless `allow_unused`.

    Seen on the way, in order: `cumulative`, the cumulative sums tokens are drawn by (of `searchsorted`, or
    of the weights of `multinomial`), and `compared`, both sides of every `<` or `<=` between two float
    tensors.
    """

    def __init__(self, uniforms: Sequence[float] | None = None, *, allow_unused: bool = False) -> None:
        super().__init__()
        self.cumulative: list[Tensor] = []
        self.compared: list[tuple[Tensor, Tensor]] = []
        self._uniforms = None if uniforms is None else list(uniforms)
        self._num_used = 0
        self._allow_unused = allow_unused

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        super().__exit__(exc_type, exc_value, traceback)  # type: ignore[no-untyped-call]
        unused = len(self._uniforms or ()) - self._num_used
        if exc_type is None and unused and not self._allow_unused:
            raise InvalidInput(
                f"the sampler left {unused} of {len(self._uniforms or ())} uniforms unused; give it as many "
                "as it draws, or allow_unused=True"
            )

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if name in _LESS and all(isinstance(side, Tensor) and side.is_floating_point() for side in args[:2]):
            self.compared.append((args[0], args[1]))
        if name == "searchsorted":
            self.cumulative.append(args[0])
        if name == "multinomial":
            self.cumulative.append(args[0].to(torch.float64).cumsum(dim=-1))
        if self._uniforms is None:
            return func(*args, **kwargs)
        if name == "multinomial":
            return self._multinomial(*args, **kwargs)
        if name in _UNIFORM:
            shaped = func(*args, **kwargs)
            return self._next(shaped.numel()).reshape(shaped.shape).to(shaped)
        if name in _OTHER_DRAWS or name in _OTHER_DRAWS_IN_PLACE:
            raise InvalidInput(f"the sampler draws by torch's {name}, which can't be given its uniforms")
        return func(*args, **kwargs)

    def _multinomial(self, weights: Tensor, num_samples: int, *_: Any, **__: Any) -> Tensor:
        if num_samples != 1:
            raise InvalidInput(
                f"torch.multinomial can be given its uniforms for 1 sample a row, not {num_samples}"
            )
        rows = weights.shape[:-1]
        token = inverse_cdf(weights.to(torch.float64), self._next(rows.numel()).reshape(rows))
        return token[..., None]

    def _next(self, count: int) -> Tensor:
        uniforms = self._uniforms or []
        taken = uniforms[self._num_used : self._num_used + count]
        if len(taken) < count:
            raise InvalidInput(f"the sampler drew more than the {len(uniforms)} uniforms it was given")
        self._num_used += count
        return torch.tensor(taken, dtype=torch.float64)
