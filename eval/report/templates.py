"""Jinja2 for the page: every text is escaped when it enters the markup, unless it is markup itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

_ENVIRONMENT = Environment(
    loader=FileSystemLoader(Path(__file__).resolve().parent),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_ENVIRONMENT.filters["spec"] = format
# A browser's JSON.parse refuses a NaN, so it must not get into the page.
_ENVIRONMENT.policies["json.dumps_kwargs"] = {"allow_nan": False}


def render(name: str, **values: Any) -> str:
    """The template `name` with these values."""
    return _ENVIRONMENT.get_template(name).render(values)


def macro(name: str, template: str, *arguments: Any) -> Markup:
    """What a macro of a template gives."""
    text: Markup = getattr(_ENVIRONMENT.get_template(template).module, name)(*arguments)
    return text
