"""Chats as text, by the Jinja template that a published model carries."""

import datetime
import json
from collections.abc import Mapping, Sequence

import jinja2
import jinja2.ext
import jinja2.sandbox

# Stands where the last message ends, to find that place in what the template made of it; the space
# after it tells whether the template keeps white space there.
_MARK = "\u2063end of the last message\u2063"


class _Generation(jinja2.ext.Extension):
  """`{% generation %} .. {% endgeneration %}` marks the model's own words: they stay so."""

  tags = frozenset({"generation"})

  def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
    """Returns what stands inside the tag, in a scope of its own."""
    line = next(parser.stream).lineno
    body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
    return jinja2.nodes.Scope(body).set_lineno(line)


def render(
  template: str, messages: Sequence[Mapping[str, str]], *, words: Mapping[str, str], reply: bool
) -> str:
  """Returns a chat as the text of a prompt.

  Args:
    template: Jinja, run in a sandbox.
    messages: objects with "role" and "content".
    words: special tokens by name, such as "bos_token".
    reply: True ends with what opens the model's answer; False ends inside the last message, which
      the model goes on with.

  Raises:
    ValueError: the template refuses or cannot take the chat, or drops the message to go on with.
  """
  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
  )
  environment.filters["tojson"] = _to_json
  environment.globals |= {"raise_exception": _refuse, "strftime_now": _now}
  chat = [dict(message) for message in messages]
  if not reply:
    chat[-1]["content"] += f"{_MARK} "
  try:
    text = environment.from_string(template).render(
      messages=chat, add_generation_prompt=reply, tools=None, documents=None, **words
    )
  except Exception as error:  # a template is a program: whatever it stumbles over
    said = " ".join(str(error).split())
    if not isinstance(error, jinja2.TemplateError):
      said = f"{type(error).__name__}: {said}"
    raise ValueError(f"the chat template refuses this chat: {said}") from error
  if reply:
    return text
  if _MARK not in text:
    raise ValueError("the chat template drops the last message, which was to be gone on with")
  place = text.rindex(_MARK)
  return text[:place] if text[place + len(_MARK) :].startswith(" ") else text[:place].rstrip()


def _to_json(value, indent=None, ensure_ascii=False, separators=None, sort_keys=False) -> str:
  return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                    sort_keys=sort_keys)


def _refuse(message: str) -> None:
  raise jinja2.TemplateError(message)


def _now(form: str) -> str:
  return datetime.datetime.now().strftime(form)
