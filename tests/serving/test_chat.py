"""Chat templates: turns read one by one make the conversation that the template renders as a whole."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mnemic.core.errors import UnsupportedError
from mnemic.serving.chat import ChatTemplate
from mnemic.serving.errors import InvalidRequest
from tests.serving.tokenizers_for_tests import byte_level

CHATML = (
    "{% if messages[0].role != 'system' %}<s>system\nBe kind.</s>\n{% endif %}"
    "{% for m in messages %}{% if m.role not in ['system', 'user', 'assistant'] %}{{ raise_exception('unknown role') }}"
    "{% endif %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
# Renders the last answer differently from earlier ones, as templates for reasoning do.
THINKING = (
    "{% for m in messages %}<s>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}"
    "{{ m.content }}</s>\n{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


@pytest.fixture
def tokenizer():
    return byte_level()


@pytest.mark.parametrize("template", [CHATML, THINKING, None])
def test_turns_join_to_the_whole_conversation(tokenizer, template):
    tokenizer.chat_template = template
    chat = ChatTemplate(tokenizer)
    turns, answers = [[user("hello")], [user("go on")], [user("and"), user("more")]], ["yes", "the cat", "sat"]
    read, messages = [], []
    for i, (turn, answer) in enumerate(zip(turns, answers, strict=True)):
        read += chat.following(turn) if i else chat.first(turn)
        messages += turn
        whole = tokenizer.apply_chat_template(
            messages, chat_template=chat.template, tokenize=False, add_generation_prompt=True
        )
        assert tokenizer.decode(read) == whole
        # After the plain template's "Assistant:" an answer begins with a space.
        made = answer if template else f" {answer}"
        read += tokenizer.encode(made, add_special_tokens=False) + chat.closing
        messages.append(assistant(answer))


def test_what_closes_a_turn_begins_with_the_end_token(tokenizer):
    tokenizer.chat_template = CHATML
    chat = ChatTemplate(tokenizer)
    assert tokenizer.decode(chat.closing) == "</s>\n"
    assert chat.closing[0] == tokenizer.eos_token_id
    assert chat.stop == ()


def test_the_plain_template_stops_where_the_next_speaker_begins(tokenizer):
    chat = ChatTemplate(tokenizer)
    assert tokenizer.decode(chat.first([user("hello")])) == "User: hello\nAssistant:"
    assert "\nUser:" in chat.stop


def test_messages_that_the_template_refuses(tokenizer):
    tokenizer.chat_template = CHATML
    chat = ChatTemplate(tokenizer)
    for read in (chat.first, chat.following):
        with pytest.raises(InvalidRequest, match="unknown role") as caught:
            read([{"role": "judge", "content": "x"}])
        assert caught.value.param == "messages"


@pytest.mark.parametrize(
    "template, why",
    [
        ("{{ messages[-1].content }}", "changes or repeats"),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "changes or repeats"),
        ("{% if messages | length > 2 %}{{ raise_exception('too long') }}{% endif %}x", "no conversation of three"),
        ("{% for m in messages %}{{ m.content }}{% if loop.last %}.{% else %};{% endif %}{% endfor %}", "differently"),
    ],
)
def test_templates_that_cannot_go_on_are_refused_with_the_reason(tokenizer, template, why):
    tokenizer.chat_template = template
    with pytest.raises(UnsupportedError, match=why):
        ChatTemplate(tokenizer)


def words(*known):
    """A tokenizer of these words alone."""
    tokens = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokens)


def test_a_tokenizer_without_the_templates_words_cannot_chat():
    with pytest.raises(UnsupportedError, match="no tokens for the chat template"):
        ChatTemplate(words("Mary", "kitchen"))


def test_text_that_the_tokenizer_cannot_read_is_the_clients_mistake():
    template = ChatTemplate(words("User", "Assistant", ":", "Mary"))
    assert template.first([user("Mary")])
    with pytest.raises(InvalidRequest, match="cannot read") as caught:
        template.first([user("John")])
    assert caught.value.param == "messages"
