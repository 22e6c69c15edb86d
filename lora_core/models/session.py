"""A conversation's keys and values, kept from turn to turn.

Each turn of a chat is rendered anew from its first message, and most of its tokens are those of the
turn before. `Session` compares tokens, not texts, and keeps of the cache what the two have in
common: a template that rewrites earlier turns, or an answer whose text is cut into other tokens
than the model wrote, costs the computation from there on, never a wrong result. At least the
prompt's last token is run again, since its logits are what the answer begins with.
"""

from collections.abc import Sequence

from lora_core.models.cache import KVCache


class Session:
    """What a conversation keeps; for `generate(…, session=)`.

    The caller clears it when what the model computes changes (another adapter). Models that
    generate in the growing way (growing.py) compute all tokens anew.

    Attributes:
        cache: keys and values.
        ids: the tokens that they belong to.
        reused: tokens of the last prompt that were not run again.
    """

    cache: KVCache
    ids: list[int]
    reused: int

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.cache, self.ids, self.reused = KVCache(), [], 0

    def begin(self, ids: Sequence[int], switches_after: int | None = None) -> None:
        """Keep of the cache what a new prompt begins with, its last token excepted.

        Args:
            ids: the prompt.
            switches_after: the model's; keys of a text on the other side of it are of no use.
        """
        same, most = 0, min(len(self.ids), len(ids) - 1)
        while same < most and self.ids[same] == ids[same]:
            same += 1
        if switches_after is not None:
            same *= (len(self.ids) > switches_after) == (len(ids) > switches_after)
        self.cache.crop(max(same, 0))
        self.ids, self.reused = list(ids[:same]), same

    def end(self, ids: Sequence[int]) -> None:
        """Say which tokens were run, or were about to be; the cache holds the first of them."""
        self.ids = list(ids[: self.cache.held])
