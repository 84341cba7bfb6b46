"""What every page that people read shares: one style, and templates that escape all and forgive nothing."""

from importlib.resources import files

from jinja2 import Environment, StrictUndefined


def page_environment() -> Environment:
    """Give an environment for pages of one file each, whose templates write `{{ style|safe }}` between style tags."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.globals["style"] = files(__package__).joinpath("page.css").read_text(encoding="utf-8")
    return environment
