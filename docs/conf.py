"""Configuration of the documentation site: `make docs` builds it into build/docs, without a network."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from typing import Any

import latex2mathml.converter

import maskloss

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent

sys.path.insert(0, str(FOLDER / "figures"))  # for curves.py, which the figures import

project = "maskloss"
release = version = maskloss.__version__
copyright = "the authors of maskloss, Apache-2.0"

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "matplotlib.sphinxext.plot_directive",
]
# `repository/` is written below, and `_build` by people who run sphinx-build by hand.
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"maskloss {version}"
html_static_path = ["static"]
html_css_files = ["formulas.css"]
html_copy_source = False

myst_enable_extensions = ["dollarmath", "colon_fence"]
# As on GitHub, a heading is linked by its words.
myst_heading_anchors = 4
# Notebooks are shown with their committed outputs; the tests run them.
nb_execution_mode = "off"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Source"]
# In a docstring, `name` links to the name's page if it has one, and is code otherwise.
default_role = "py:obj"

plot_include_source = False
plot_html_show_source_link = False
plot_html_show_formats = False
plot_formats = ["svg"]
plot_basedir = str(FOLDER)
plot_working_directory = str(FOLDER)
plot_rcparams = {"svg.fonttype": "none", "font.size": 9, "axes.grid": True, "grid.alpha": 0.3}

#: Files of the repository that are also pages of the site.
PAGES = {
    "benchmarks/README.md": "benchmarks",
    "benchmarks/ablations/README.md": "ablation_findings",
    "benchmarks/imbalance/README.md": "imbalance",
    "benchmarks/mask_heads/README.md": "mask_head_findings",
    "benchmarks/real_network/README.md": "real_network",
    "CHANGELOG.md": "changelog",
    "CONTRIBUTING.md": "contributing",
    "notebooks/01_first_model.ipynb": "first_model",
    "notebooks/02_your_own_loss.ipynb": "your_own_loss",
    "notebooks/03_what_the_mask_loses.ipynb": "what_the_mask_loses",
    "notebooks/04_weak_labels.ipynb": "weak_labels_notebook",
}
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")


def with_links_for_the_site(text: str, file: Path) -> str:
    """Return the Markdown `text` of `file` with links that work on the site.

    Links to files that are no pages, such as scripts, become code with the path in the repository.
    """

    def replaced(found: re.Match[str]) -> str:
        picture, label, target = found.groups()
        path, _, anchor = target.partition("#")
        if not path or "://" in path or target.startswith("mailto:"):
            return found[0]
        linked = (file.parent / path).resolve()
        relative = linked.relative_to(ROOT).as_posix()
        if not linked.exists():
            raise FileNotFoundError(f"{file.relative_to(ROOT)} links to {target}, which does not exist")
        if picture or linked.suffix in (".png", ".svg"):
            return f"{picture}[{label}](/{Path('..', relative).as_posix()})"
        if relative in PAGES:
            page = f"/repository/{PAGES[relative]}{linked.suffix}"
        elif relative == "README.md":
            page = "/index.md"
        elif linked.suffix == ".md" and linked.is_relative_to(FOLDER):
            page = f"/{linked.relative_to(FOLDER).as_posix()}"
        elif linked.parent == ROOT / "examples":
            page = "/examples.md"
        else:
            words = label.strip("`")
            return (
                f"`{relative}`"
                if words in (relative, Path(relative).name, path)
                else f"{label} (`{relative}`)"
            )
        return f"[{label}]({page}{'#' + anchor if anchor else ''})"

    return LINK.sub(replaced, text)


def copy_pages(_: Any) -> None:
    """Write the pages that are files of the repository outside docs/."""
    shutil.rmtree(FOLDER / "repository", ignore_errors=True)
    (FOLDER / "repository").mkdir()
    for name, page in PAGES.items():
        text = with_links_for_the_site((ROOT / name).read_text("utf-8"), ROOT / name)
        (FOLDER / "repository" / page).with_suffix(Path(name).suffix).write_text(text, encoding="utf-8")


def rewrite_links(app: Any, name: str, source: list[str]) -> None:
    """Make the links of the pages in docs/ work on the site. On GitHub they work as they are."""
    path = Path(app.env.doc2path(name))
    if path.suffix == ".md" and path.parent.name != "repository":
        source[0] = with_links_for_the_site(source[0], path)


def escape_docstring(_: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Escape what is plain text in our docstrings and has a meaning in reStructuredText: |x|, x_, *."""
    for place, line in enumerate(lines):
        if line.lstrip().startswith((">>>", "...")):
            continue
        # Odd parts are code.
        parts = line.split("`")
        parts[::2] = [re.sub(r"([|*]|_(?!\w))", r"\\\1", part) for part in parts[::2]]
        # A word may go on after code, as in `file_name`s.
        parts[2::2] = [re.sub(r"^(?=\w)", r"\\ ", part) for part in parts[2::2]]
        lines[place] = "`".join(parts)


def write_inline_math(self: Any, node: Any) -> None:
    """Write a formula as MathML, which browsers draw without a script."""
    import docutils.nodes

    self.body.append(latex2mathml.converter.convert(node.astext()))
    raise docutils.nodes.SkipNode


def write_display_math(self: Any, node: Any) -> None:
    """Write a formula on its own line as MathML."""
    import docutils.nodes

    formula = latex2mathml.converter.convert(node.astext(), display="block")
    self.body.append(f'<div class="formula">{formula}</div>')
    raise docutils.nodes.SkipNode


def setup(app: Any) -> None:
    """Connect the functions above."""
    app.add_html_math_renderer("mathml", (write_inline_math, None), (write_display_math, None))
    app.connect("builder-inited", copy_pages)
    app.connect("source-read", rewrite_links)
    app.connect("autodoc-process-docstring", escape_docstring, priority=400)  # napoleon has 500


html_math_renderer = "mathml"
