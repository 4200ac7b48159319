# SPDX-License-Identifier: Apache-2.0
"""Running statistics of one activation over the denoising steps: numbers of a fixed count, never the trajectory."""

import zlib

import torch
from torch import Tensor

TOKENS_PER_STEP = 8


class StepObserver:
    """Per-channel minimum and maximum a step, and a uniform sample of up to 8 tokens a step.

    The extremes give shifts, scales and ranges exactly. The tokens are what a range *search* needs on top: its error
    depends on the distribution after the transforms, which are not known yet while observing.
    Memory: S K (8 + 2 R) bytes in RAM and file, for S steps, K channels, R = 8 tokens; no more for more calls.
    second_moments: also sum x x^T over all tokens of all steps, and sum x of each step, which together give the same
        sum of any affine change of x: what GPTQ asks for. 4 K (K + S) bytes more, the products where x is.
    """

    def __init__(
        self, name: str, seed: int, tokens_per_step: int = TOKENS_PER_STEP, second_moments: bool = False
    ) -> None:
        self.name = name
        self.seed = seed
        self.tokens_per_step = tokens_per_step
        self._low: list[Tensor] = []
        self._high: list[Tensor] = []
        self._tokens: list[Tensor] = []
        self._keys: list[Tensor] = []
        self._generator = torch.Generator()
        self.second_moments = second_moments
        self._products: Tensor | None = None
        self._sums: list[Tensor] = []
        self._counts: list[int] = []

    def start_call(self, call: int) -> None:
        """Reseed from (seed, site, call), so that a resumed run samples what an uninterrupted one would have."""
        self._generator.manual_seed(zlib.crc32(f"{self.seed}/{self.name}/{call}".encode()))

    @torch.no_grad()
    def update(self, x: Tensor, step: int) -> None:
        """x: [..., K], what the site received in one forward of the step with this index."""
        x = x.detach().reshape(-1, x.shape[-1])  # [M, K]
        low, high = (bound.float().cpu() for bound in x.aminmax(dim=0))
        keys = torch.rand(len(x), generator=self._generator)
        keys, rows = keys.topk(min(self.tokens_per_step, len(x)), largest=False)
        tokens = x[rows.to(x.device)].to(torch.bfloat16).cpu()
        self._grow(step + 1, x.shape[-1])
        self._low[step] = torch.minimum(self._low[step], low)
        self._high[step] = torch.maximum(self._high[step], high)
        self._merge_tokens(step, tokens, keys)
        if self.second_moments:
            self._add_products(x.float(), step)

    def _add_products(self, x: Tensor, step: int) -> None:
        """x: [M, K] fp32."""
        if self._products is None:
            self._products = x.new_zeros(x.shape[1], x.shape[1])
        self._products = self._products.to(x.device).addmm_(x.T, x)
        self._sums[step] += x.sum(dim=0).cpu()
        self._counts[step] += len(x)

    def first_bad_step(self) -> int | None:
        """The first step in which the site received NaN or an infinite value."""
        for step, (low, high, keys) in enumerate(zip(self._low, self._high, self._keys, strict=True)):
            if len(keys) and not (torch.isfinite(low).all() and torch.isfinite(high).all()):
                return step
        return None

    def pad_to(self, steps: int) -> None:
        """Rows for steps in which the site was not reached: minimum inf, maximum -inf, no tokens."""
        self._grow(steps, self._low[0].numel())

    def _grow(self, steps: int, channels: int) -> None:
        for _ in range(steps - len(self._low)):
            self._low.append(torch.full((channels,), torch.inf))
            self._high.append(torch.full((channels,), -torch.inf))
            self._tokens.append(torch.empty(0, channels, dtype=torch.bfloat16))
            self._keys.append(torch.empty(0))
            self._sums.append(torch.zeros(channels))
            self._counts.append(0)

    def _merge_tokens(self, step: int, tokens: Tensor, keys: Tensor) -> None:
        """Keep the R smallest of all random keys so far: a uniform sample of all tokens without replacement."""
        keys = torch.cat([self._keys[step], keys])
        keys, kept = keys.topk(min(self.tokens_per_step, len(keys)), largest=False)
        self._keys[step] = keys
        self._tokens[step] = torch.cat([self._tokens[step], tokens])[kept]

    def to_tensors(self) -> dict[str, Tensor]:
        """min, max [S, K] fp32; tokens [S, R, K] bf16 and their keys [S, R], R the least count of any visited step."""
        visited = [len(keys) for keys in self._keys if len(keys)]
        count = min(visited, default=0)
        channels = self._low[0].numel() if self._low else 0

        def rows(items: list[Tensor], fill: Tensor) -> Tensor:
            return torch.stack([item[:count] if len(item) else fill for item in items])

        tensors = {
            "min": torch.stack(self._low),
            "max": torch.stack(self._high),
            "tokens": rows(self._tokens, torch.zeros(count, channels, dtype=torch.bfloat16)),
            "keys": rows(self._keys, torch.ones(count)),
        }
        if self._products is not None:
            tensors |= {"sums": torch.stack(self._sums), "counts": torch.tensor(self._counts)}
        return tensors

    @property
    def products(self) -> Tensor | None:
        """sum x x^T, [K, K] fp32; None where second moments were not asked for."""
        return None if self._products is None else self._products.cpu()

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Continue from what `to_tensors` returned."""
        self._low, self._high = list(tensors["min"].unbind()), list(tensors["max"].unbind())
        self._tokens, self._keys = list(tensors["tokens"].unbind()), list(tensors["keys"].unbind())
        channels = tensors["min"].shape[1]
        self._sums = list(tensors.get("sums", torch.zeros(len(self._low), channels)).unbind())
        self._counts = tensors.get("counts", torch.zeros(len(self._low), dtype=torch.int64)).tolist()
        self._products = tensors.get("products")
