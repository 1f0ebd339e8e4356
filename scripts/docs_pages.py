"""A hook of mkdocs: it adds a page for each document outside of docs/, and one for each module, made of its docstrings.

mkdocstrings reads the sources; nothing of the package is imported.
"""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "vllm_npu"
BESIDE = {"README.md": "index.md", **{name: name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")}}
NO_API = ("cli", "emulator/startup")  # nothing to import: `vllm-npu --help` describes cli, and Python runs startup


def modules() -> dict[str, list[str]]:
    """Dotted names of modules, by their folder."""
    found: dict[str, list[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        relative = path.relative_to(PACKAGE)
        if path.stem != "__main__" and not relative.as_posix().startswith(NO_API):
            name = relative.parent if path.stem == "__init__" else relative.with_suffix("")
            dotted = ".".join([PACKAGE.name, *name.parts])
            found.setdefault("/".join([PACKAGE.name, *relative.parts[:-1]]), []).append(dotted)
    return found


def on_config(config: MkDocsConfig) -> None:
    """Put the API last in the navigation."""
    pages = [{folder: [{name: f"api/{name}.md"} for name in names]} for folder, names in modules().items()]
    config.nav = [*config.nav, {"API": pages}]


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the pages. Links to docs/ become links in it."""
    for source, page in BESIDE.items():
        text = (ROOT / source).read_text(encoding="utf-8").replace("](docs/", "](")
        files.append(File.generated(config, page, content=text.replace("](README.md", "](index.md")))
    for names in modules().values():
        for name in names:
            files.append(File.generated(config, f"api/{name}.md", content=f"# {name}\n\n::: {name}\n"))
