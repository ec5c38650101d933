"""How quick a version is, as measured: its start, its prompts, its answers.

Facts and their arithmetic alone. Must not know where they were measured.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

_MEMORY = 0.98
"""What each sample leaves of the weight of those before: some fifty of them count."""
_LEAST_WEIGHT = 3.0
_START_SHARE = 0.3


@dataclass(frozen=True, slots=True)
class Pace:
    """What is known of a version (``model``, fixed) under a deployment; 0 is not measured.

    ``start_s`` is the time from a replica's start to its first readiness. ``prompt_token_s`` is the
    time to the first token for each token of a prompt that was not cached; ``output_tokens`` is the
    mean answer. The time for each further token grows with the requests at a replica: the last five
    are the weighted moments of that line (weight, requests x, seconds y, xx, xy).
    """

    deployment: str = ""
    model: str = ""
    start_s: float = 0.0
    prompt_token_s: float = 0.0
    output_tokens: float = 0.0
    weight: float = 0.0
    x: float = 0.0
    y: float = 0.0
    xx: float = 0.0
    xy: float = 0.0

    def started(self, seconds: float) -> Pace:
        """With one more start measured; a slower one counts at once, so that the next comes no
        later than foreseen."""
        share = 1.0 if seconds > self.start_s else _START_SHARE
        return replace(self, start_s=self.start_s + (seconds - self.start_s) * share)

    def answered(
        self, prompt_token_s: float, output_tokens: float, token_s: float, ongoing: float
    ) -> Pace:
        """With one more sample of answers: means over those that ended, ``token_s`` seconds for
        each further token while ``ongoing`` requests were at a replica."""
        weight = self.weight * _MEMORY + 1.0
        share = 1.0 / weight
        return replace(
            self,
            prompt_token_s=_mixed(self.prompt_token_s, prompt_token_s, share),
            output_tokens=_mixed(self.output_tokens, output_tokens, share),
            weight=weight,
            x=self.x * _MEMORY + ongoing,
            y=self.y * _MEMORY + token_s,
            xx=self.xx * _MEMORY + ongoing * ongoing,
            xy=self.xy * _MEMORY + ongoing * token_s,
        )

    @property
    def known(self) -> bool:
        """Whether enough answers were measured to reckon with."""
        return self.weight >= _LEAST_WEIGHT and self.y > 0.0 and self.output_tokens > 0.0

    def token_s(self, ongoing: float) -> float:
        """Seconds for each further token with ``ongoing`` requests at a replica: the line of least
        squares; its mean while all samples were taken at much the same load."""
        mean_x, mean_y = self.x / self.weight, self.y / self.weight
        spread = self.xx / self.weight - mean_x**2
        if spread <= max(0.01 * mean_x**2, 1e-9):
            return mean_y
        slope = max((self.xy / self.weight - mean_x * mean_y) / spread, 0.0)
        return max(mean_y + slope * (ongoing - mean_x), 0.2 * mean_y)

    def request_s(self, prompt_tokens: float, ongoing: float) -> float:
        """Seconds that a usual request stays at a replica with ``ongoing`` others."""
        return prompt_tokens * self.prompt_token_s + self.output_tokens * self.token_s(ongoing)


def _mixed(before: float, sample: float, share: float) -> float:
    return before + (sample - before) * share
