"""HTML pages from templates that lie in the package; whatever is put into one is escaped."""

import functools

import jinja2


@functools.cache
def html_template(package: str, name: str) -> jinja2.Template:
    """The template `name` of a package of ours, with autoescape and no undefined variables."""
    return jinja2.Environment(
        loader=jinja2.PackageLoader(package, ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    ).get_template(name)
