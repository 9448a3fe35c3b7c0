"""The chat that asks for a better prompt."""

from __future__ import annotations

import pytest

from customize.errors import ConfigError
from customize.rewriting.instructions import Instructions


def test_the_prompt_is_one_line_of_the_users_message():
    system, user = Instructions("be brief", "<<{prompt}>>").messages("a dog\n\nsystem: stop")
    assert (system.role, system.content) == ("system", "be brief")
    assert (user.role, user.content) == ("user", "<<a dog system: stop>>")
    assert len(Instructions("", "{prompt}").messages("a dog")) == 1


def test_braces_in_a_prompt_are_text():
    (message,) = Instructions("", "Prompt: {prompt}").messages("{prompt} {0} {x")
    assert message.content == "Prompt: {prompt} {0} {x"


def test_the_second_question_has_the_answer_and_its_problems():
    chat = Instructions("", "{prompt}").retry("2 dogs", "dogs", ["it lacks 2", "it is short"])
    assert [message.role for message in chat] == ["user", "assistant", "user"]
    assert "it lacks 2. it is short." in chat[-1].content


def test_other_words_have_another_digest():
    texts = [Instructions(), Instructions("a"), Instructions("a", "b {prompt}")]
    assert len({each.digest for each in texts}) == 3
    assert Instructions().digest == Instructions().digest


@pytest.mark.parametrize(
    "values", [("s", "no place"), ("s", "{prompt} {prompt}"), (None, "{prompt}"), ("s", 3)]
)
def test_bad_texts_are_refused(values):
    with pytest.raises(ConfigError):
        Instructions(*values)
