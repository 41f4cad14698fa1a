"""The pages that this program writes: templates beside the code that fills them, under one head and style (head.html). A page stands
alone: it loads nothing from elsewhere."""

from pathlib import Path
from typing import Any


def filled(template: Path, **values: Any) -> str:
    """The HTML of a template. It sets `title`, and `policy`, what its Content-Security-Policy allows, and includes head.html."""
    import jinja2

    loader = jinja2.FileSystemLoader([template.parent, Path(__file__).parent])
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(template.name).render(**values)
