"""Chats become prompts by the template a model carries, whatever is in it."""

import pytest

from hybridlm.eval import chat

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Well"}]


def render(template, *, reply=True):
  """The chat as a template makes it."""
  return chat.render(template, CHAT, words={"eos_token": "<eos>"}, reply=reply)


def test_the_mark_around_the_model_s_own_words_changes_no_text():
  inside = "{{ m['content'] }}{{ eos_token }}{% if loop.last %}.{% endif %}"
  loop = "{%% for m in messages %%}[{{ m['role'] }}] %s{%% endfor %%}"
  plain = render(loop % inside)
  assert plain == "[user] Hi<eos>[assistant] Well<eos>."
  assert render(loop % f"{{% generation %}}{inside}{{% endgeneration %}}") == plain
  stripped = loop % f"{{%- generation -%}} {inside} {{%- endgeneration %}}"
  assert render(stripped) == plain.replace("] ", "]")


def test_a_chat_to_go_on_with_ends_inside_its_last_message():
  template = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}"
  assert render(template, reply=False) == "<Hi><Well"
  with pytest.raises(ValueError, match="drops the last message"):
    render("{{ messages[0]['content'] }}", reply=False)


@pytest.mark.parametrize("template,words", [
  ("{{ messages[9]['content'] }}", "refuses this chat: .* has no element 9"),
  ("{{ 1 // 0 }}", "ZeroDivisionError: "), ("{{ messages + 3 }}", "TypeError: "),
  ("{% generation %}", "refuses this chat: Unexpected end of template"),
  ("{% for %}", "refuses this chat: "), ("{{ range(10**9) | list }}", "OverflowError: "),
  ("{{ raise_exception('roles must\n alternate') }}", "this chat: roles must alternate$"),
])
def test_whatever_a_template_stumbles_over_is_one_line(template, words):
  with pytest.raises(ValueError, match=words) as caught:
    render(template)
  assert "\n" not in str(caught.value)
