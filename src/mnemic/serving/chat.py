"""Chat templates for streams: what a stream that has read the conversation so far must read of new messages.

A template renders whole conversations, a stream reads each text once. So a short fixed conversation is rendered with
the new messages behind it, and what follows its last answer is what the stream reads. Templates that render a turn
differently depending on far earlier ones are not reproduced in that. Control tokens are the template's alone: what
looks like one in a message is read as text.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ..core.errors import UnsupportedError
from .control_tokens import ControlTokens
from .errors import InvalidRequest

PLAIN = (
    "{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
_ANSWER = "mnemic7answer"
_BEFORE = ({"role": "user", "content": "Hello"}, {"role": "assistant", "content": _ANSWER})

Message = Mapping[str, Any]


class ChatTemplate:
    """The tokenizer's own template, or a plain one ("User: ...", "Assistant: ...") where it has none.

    closing: ids that end an assistant's turn, to be read behind each answer (`Work.closing`): then every stream stands
    at the same place of the template, however its answer ended. stop: strings that end an answer; only for the plain
    template, which has no token for it.

    Raises:
        UnsupportedError: the template cannot render a conversation that goes on, with the reason.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        own = getattr(tokenizer, "chat_template", None)
        self.template = own or PLAIN
        self.controls = ControlTokens(tokenizer, self.template)
        self.stop: tuple[str, ...] = () if own else ("\nUser:", "\nSystem:", "\nAssistant:")
        try:
            before = self._rendered(_BEFORE, prompt=False)
            after = self._rendered((*_BEFORE, {"role": "user", "content": "Go on"}))
        except InvalidRequest as error:
            raise UnsupportedError(f"The chat template renders no conversation of three messages: {error}") from error
        if before.count(_ANSWER) != 1 or after.count(_ANSWER) != 1:
            raise UnsupportedError("The chat template changes or repeats the text of an answer; give another one.")
        self._end = before.partition(_ANSWER)[2]
        if not after.partition(_ANSWER)[2].startswith(self._end):
            raise UnsupportedError(
                f"The chat template ends an answer with {self._end!r}, but differently when a message follows; a "
                "stream that has read the answer could not go on. Give another template."
            )
        try:
            # The plain template brings words of its own.
            self._ids("" if own else self._rendered([{"role": "user", "content": ""}]))
            self.closing: list[int] = self._ids(self._end) if self._end else []
        except InvalidRequest as error:
            raise UnsupportedError(f"The tokenizer has no tokens for the chat template: {error}") from error

    def first(self, messages: Sequence[Message], **variables: Any) -> list[int]:
        """Ids of a conversation that begins, up to where the answer begins."""
        return self._ids(self._rendered(self._marked(messages), **variables))

    def following(self, messages: Sequence[Message], **variables: Any) -> list[int]:
        """Ids of new messages, for a stream that has read the conversation before them, `closing` included."""
        text = self._rendered((*_BEFORE, *self._marked(messages)), **variables).partition(_ANSWER)[2]
        if not text.startswith(self._end):
            raise InvalidRequest("The chat template has no place for these messages.", param="messages")
        return self._ids(text.removeprefix(self._end))

    def _marked(self, messages: Sequence[Message]) -> list[Message]:
        return [self.controls.mark(message) for message in messages]

    def _rendered(self, messages: Sequence[Message], *, prompt: bool = True, **variables: Any) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                [dict(m) for m in messages],
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=prompt,
                **variables,
            )
        # Templates raise what they like about roles and orders that they do not know.
        except Exception as error:
            raise InvalidRequest(f"The chat template refuses these messages: {error}", param="messages") from error

    def _ids(self, text: str) -> list[int]:
        try:
            if self.controls.is_marked(text):
                return self.controls.ids(text)
            return self.tokenizer(text, add_special_tokens=False)["input_ids"]
        except InvalidRequest as error:
            raise InvalidRequest(str(error), param="messages") from error
        # The tokenizers library raises bare exceptions, for example on a word without a token.
        except Exception as error:
            raise InvalidRequest(f"The tokenizer cannot read this text: {error}", param="messages") from error
