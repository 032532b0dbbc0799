"""Load a config from its file, the files it extends, and the command line.

Files are YAML, merged by OmegaConf (`extends: other.yaml`, or a list; later wins). In a file `${model.hidden_size}` is
replaced by the value of another key. OmegaConf's resolvers (`${oc.env:HOME}`) are refused, because an untrusted config
could copy secrets from the environment into a path or a log. Command-line values come last; they are typed by the
schema, not by YAML. All errors are reported at once.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from ctllm_jax.config.base import Section
from ctllm_jax.config.errors import UserError, check_format
from ctllm_jax.config.types import (
    check_aliases,
    is_section,
    key_lines,
    keys_of,
    named_sections,
    parse,
    parse_yaml,
    without_none,
)

S = TypeVar("S", bound=Section)
COMMAND_LINE = "command line"
FORMAT, FORMAT_KEY = 1, "config_format"
"""The format of the configs that this version writes, and the key of a file that states it; without it, format 1."""
_MOST_FILES, _MOST_INTERPOLATIONS = 64, 16
"""Files that a config extends, each counted as often as it is named, and `${KEY}` in all of them: both multiply."""
_ESCAPED = re.compile(r"(?<!\\)(?:\\\\)*\\\$\{")
_KEY_INTERPOLATION = re.compile(r"\$\{\s*\.*[\w.\[\]-]+\s*\}")


@dataclass
class Loaded:
    """Raw values of a config, and where each dotted key came from (`file:line`, or the command line)."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)

    def origin(self, path: str) -> str:
        """The origin of a key, or of the nearest key above it."""
        while path:
            if path in self.origins:
                return self.origins[path]
            path = path.rpartition(".")[0]
        return ""


class ConfigError(UserError):
    """All errors of a config, one line each."""

    def __init__(self, problems: Sequence[str]):
        self.problems = list(problems)
        head = f"{len(self.problems)} problems in the config:\n  " if len(self.problems) > 1 else ""
        super().__init__(head + "\n  ".join(self.problems))


def config_root() -> Path:
    """The folder of the package's configs: next to the package in a checkout, inside it in an installation."""
    package = Path(__file__).resolve().parent.parent
    beside = package.parent / "configs"
    return beside if (package.parent / "setup.cfg").exists() and beside.is_dir() else package / "configs"


def find_config(target: str) -> Path:
    """The file of a config: a path, or the name of a config of the package (`configs/` and `.yaml` optional)."""
    name = target.removeprefix("configs/")
    root = config_root()
    for path in (Path(target), Path(target + ".yaml"), root / name, root / (name + ".yaml")):
        if path.is_file():
            return path
    if Path(target).is_dir():
        raise UserError(f"{target} is a folder, and a config is a YAML file; a run directory keeps its config in config.yaml")
    known = sorted(str(path.relative_to(root).with_suffix("")) for path in root.rglob("*.yaml"))
    near = ([config for config in known if config.startswith(name.rstrip("/") + "/")]
            or difflib.get_close_matches(name.removesuffix(".yaml"), known, n=3, cutoff=0.4))
    raise UserError(f"no config {target}: no such file, and none of that name comes with the package"
                    f" ({'did you mean ' + ' or '.join(near) if near else 'there are ' + ', '.join(known)}?)")


def read_file(path: Path) -> Loaded:
    """A config file merged over the files that it extends, with every `${key}` replaced by that key's value.

    Raises:
      UserError: a file cannot be read, or an interpolation does not name a key; with file and line.
    """
    loaded = Loaded()
    try:
        merged, loaded.origins = _merge_files(path.resolve())
        found = _ESCAPED.sub("", str(_plain(merged))).count("${")
        if found > _MOST_INTERPOLATIONS:
            raise UserError(f"{_shown(path.resolve())}: {found} times ${{KEY}}, and at most {_MOST_INTERPOLATIONS} are replaced; write the values themselves")
        loaded.values = _plain(merged, resolve=True)
    except OmegaConfBaseException as error:
        where = loaded.origin(error.full_key or "") or _shown(path.resolve())
        raise UserError(f"{where}: {str(error).splitlines()[0]}") from None
    return loaded


def read_values(path: Path) -> dict[str, Any]:
    """Read the unvalidated values of a run's config.yaml. Raises UserError if they cannot be read."""
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("it holds no keys")
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}); restore it from a copy") from None
    return values


def _merge_files(path: Path, *, seen: tuple[Path, ...] = (), read: list[Path] | None = None
                 ) -> tuple[DictConfig, dict[str, str]]:
    """Return (the values of a file merged over those that it extends, before interpolation; the origin of each key).

    `read` collects every file that was read.
    """
    read = [] if read is None else read
    read.append(path)
    if len(read) > _MOST_FILES:
        raise UserError(f"{_shown(read[0])}: extends more than {_MOST_FILES - 1} files")
    if path in seen:
        raise UserError(f"{path}: extends itself through {' -> '.join(str(p) for p in seen)}")
    shown = _shown(path)
    try:
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text)
        check_aliases(root)
        is_mapping = root is None or isinstance(root, yaml.MappingNode)
        own = OmegaConf.create(text) if root is not None and is_mapping else OmegaConf.create({})
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, RecursionError, OSError) as error:
        hint = "; the two characters themselves are written \\${" if "${" in str(error) else ""
        raise UserError(f"{shown}: not a readable YAML file: {error}{hint}") from None
    if not is_mapping:
        raise UserError(f"{shown}: a config is a mapping of keys to values; found a {getattr(root, 'id', None)}")
    assert isinstance(own, DictConfig)
    raw = _plain(own)
    own_origins = {key: f"{shown}:{line}" for key, line in key_lines(root)}
    # This comes first, because merging into an interpolation resolves it.
    problems = [f"{key} ({own_origins.get(key, shown)}): {text} is not supported: only ${{KEY}}, the value of another key "
                "of the config, is replaced; write the value itself, or \\${ for these two characters"
                for key, text in _other_interpolations(raw)]
    if problems:
        raise ConfigError(problems)
    parents = raw.get("extends") or []
    parents = [parents] if isinstance(parents, str) else parents
    if not isinstance(parents, list) or not all(isinstance(parent, str) and "\0" not in parent for parent in parents):
        raise UserError(f"{shown}: extends={parents!r} must be the path of a config, or a list of them")
    check_format(raw.get(FORMAT_KEY, 1), newest=FORMAT, where=own_origins.get(FORMAT_KEY, shown), key=FORMAT_KEY)
    for name in {"extends", FORMAT_KEY} & raw.keys():
        del own[name]  # pop would resolve it
    merged, origins = OmegaConf.create({}), dict[str, str]()
    for parent in parents:
        parent_path = path.parent / parent
        if not parent_path.is_file():
            raise UserError(f"{shown}: extends {parent}, and there is no {parent_path}")
        base, base_origins = _merge_files(parent_path.resolve(), seen=(*seen, path), read=read)
        merged = _merge(merged, base)
        origins.update(base_origins)
    return _merge(merged, own), {**origins, **own_origins}


def _plain(config: DictConfig, *, resolve: bool = False) -> dict[str, Any]:
    values = OmegaConf.to_container(config, resolve=resolve)
    assert isinstance(values, dict)
    return {str(name): value for name, value in values.items()}


def _merge(config: DictConfig, over: DictConfig) -> DictConfig:
    merged = OmegaConf.merge(config, over)
    assert isinstance(merged, DictConfig)
    return merged


def _other_interpolations(tree: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """(key, text) of everything between `${` and `}` that is not the name of a key."""
    if isinstance(tree, dict | list):
        for name, inner in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _other_interpolations(inner, f"{path}.{name}" if path else str(name))
    elif isinstance(tree, str):
        text, names = _ESCAPED.sub("", tree), 1
        while names:  # a name may contain other values: ${model.${which}}
            text, names = _KEY_INTERPOLATION.subn("x", text)
        if "${" in text:
            yield path, tree


def load(schema: type[S], *, target: str | Path | None = None, overrides: Sequence[str] = ()) -> S:
    """Load and validate the config of a command.

    Args:
      schema: the section that describes it.
      target: path or name of a config file; None starts from the defaults.
      overrides: `key=value` each, from the command line.

    Raises:
      ConfigError: lists every error with key, value, origin and the nearest valid key.
    """
    loaded = read_file(find_config(str(target))) if target is not None else Loaded()
    problems = []
    _expand_shorthands(schema, loaded.values)
    for override in overrides:
        path, _, text = override.partition("=")
        try:
            _assign(schema, loaded, path, text)
        except ValueError as error:
            problems.append(f"{path}={_short(text)} ({COMMAND_LINE}): {error}")
    _expand_shorthands(schema, loaded.values)
    try:
        config = schema.model_validate(loaded.values)
    except ValidationError as error:
        problems += [_explain(schema, loaded, detail) for detail in error.errors(include_url=False)]
    if problems:
        raise ConfigError(problems)
    return config


def to_yaml(config: Section) -> str:
    """A config, resolved, as YAML."""
    return yaml.safe_dump({FORMAT_KEY: FORMAT, **config.model_dump(mode="json")}, allow_unicode=True, sort_keys=False, width=100)


def shared_values(config: Section) -> dict[str, Any]:
    """The keys that all processes of a run must share, as JSON: every key except those marked `local`."""
    from ctllm_jax.config.types import mark

    shared = config.model_dump(mode="json")
    for name, info in type(config).model_fields.items():
        value = getattr(config, name)
        if mark(info, "local"):
            del shared[name]
        elif isinstance(value, Section):
            shared[name] = shared_values(value)
        elif isinstance(value, dict):
            shared[name] |= {entry: shared_values(inner) for entry, inner in value.items() if isinstance(inner, Section)}
    return shared


def changeable_paths(schema: type[Section]) -> set[str]:
    """Dotted keys that may change on resume; a section's mark covers its keys."""
    from ctllm_jax.config.types import mark

    return {path for path, info in keys_of(schema) if mark(info, "changeable")}


def _shown(path: Path) -> str:
    """A path as a user would write it: relative to the working directory if it is below."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _shorthand(schema: type[Section], value: Any) -> dict[str, Any] | None:
    """The mapping that a bare value for a section means, or None if it has no meaning."""
    if isinstance(value, str) and hasattr(schema, "from_shorthand"):
        return schema.from_shorthand(value)
    if isinstance(value, str) and schema.shorthand:
        return {schema.shorthand: value}
    return None


def _expand_shorthands(schema: type[Section], values: dict[str, Any]) -> None:
    """Expand bare values for sections in place, and remove named sections that are set to null."""
    for name, info in schema.model_fields.items():
        annotation, _ = without_none(info.annotation)
        value = values.get(name)
        if is_section(annotation):
            expanded = _shorthand(annotation, value)
            if expanded is not None:
                value = values[name] = expanded
            if isinstance(value, dict):
                _expand_shorthands(annotation, value)
        elif (inner := named_sections(annotation)) is not None and isinstance(value, dict):
            for entry in [entry for entry, given in value.items() if given is None]:
                del value[entry]
            for entry, given in value.items():
                value[entry] = _shorthand(inner, given) or given
                if isinstance(value[entry], dict):
                    _expand_shorthands(inner, value[entry])


def _assign(schema: type[Section], loaded: Loaded, path: str, text: str) -> None:
    """Put one `path=text` of the command line into the values."""
    values, section, walked = loaded.values, schema, []
    parts = path.split(".")
    for index, part in enumerate(parts):
        last = index == len(parts) - 1
        if part not in section.model_fields:
            raise ValueError(_unknown(schema, path))
        info = section.model_fields[part]
        annotation, optional = without_none(info.annotation)
        walked.append(part)
        if last:
            value = None
            if is_section(annotation) and optional and text == "null":
                values[part] = None
            elif is_section(annotation) and (value := _shorthand(annotation, text)) is not None:
                values[part] = {**(values.get(part) or {}), **value}
            else:
                values[part] = parse(text, info)
            loaded.origins[path] = COMMAND_LINE
            return
        if is_section(annotation):
            values = _descend(values, part)
            section = annotation
        elif (inner := named_sections(annotation)) is not None:
            name = parts[index + 1]
            values = _descend(values, part)
            rest = parts[index + 2:]
            if not rest:
                values[name] = None if text == "null" else _shorthand(inner, text) or parse(text, info)
                if values[name] is None:
                    del values[name]
                loaded.origins[path] = COMMAND_LINE
                return
            _assign_named(schema, inner, loaded, _descend(values, name), path, ".".join(rest), text)
            return
        else:
            raise ValueError(f"{'.'.join(walked)} has no keys of its own")


def _assign_named(schema, inner, loaded, values, path, rest, text) -> None:
    below = Loaded(values, {})
    try:
        _assign(inner, below, rest, text)
    except ValueError as error:
        raise ValueError(_unknown(schema, path) if "unknown key" in str(error) else str(error)) from None
    loaded.origins[path] = COMMAND_LINE


def _descend(values: dict[str, Any], name: str) -> dict[str, Any]:
    if not isinstance(values.get(name), dict):
        values[name] = {}
    return values[name]


def _unknown(schema: type[Section], path: str) -> str:
    return "unknown key" + _nearest(schema, path)


def _nearest(schema: type[Section], path: str) -> str:
    known = [known for known, _ in keys_of(schema)]
    parent, _, leaf = path.rpartition(".")
    siblings = [known_path for known_path in known if known_path.rpartition(".")[0] == parent]
    near = difflib.get_close_matches(leaf, [sibling.rpartition(".")[2] for sibling in siblings], n=1, cutoff=0.6)
    if near:
        return f"; did you mean {parent + '.' if parent else ''}{near[0]}?"
    same_leaf = [known_path for known_path in known if known_path.rpartition(".")[2] == leaf]
    near = same_leaf[:1] or difflib.get_close_matches(path, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else "; --help lists the keys"


def _explain(schema: type[Section], loaded: Loaded, detail: ErrorDetails) -> str:
    """Format one of pydantic's errors as a line: key, value, origin, what is needed."""
    path = ".".join(str(part) for part in detail["loc"])
    kind, context = detail["type"], detail.get("ctx", {})
    origin = loaded.origin(path)
    where = f" ({origin})" if origin else ""
    if kind == "missing":
        return f"{path}: must be given{where}"
    if kind == "extra_forbidden":
        return f"{path}{where}: unknown key{_nearest(schema, path)}"
    if kind == "value_error":
        if set_at := _set_at(loaded, path, str(context["error"])):
            where = f" ({', '.join(set_at)})"
        return f"{path or 'config'}{where}: {context['error']}"
    shown = f"{path}={_short(detail['input'])}{where}"
    bounds = {"greater_than_equal": ("ge", ">="), "greater_than": ("gt", ">"), "less_than_equal": ("le", "<="),
              "less_than": ("lt", "<")}
    if kind in bounds:
        name, sign = bounds[kind]
        return f"{shown}: must be {sign} {context[name]}"
    hint = "; a text that looks like a number needs quotes in YAML" if kind == "string_type" and not isinstance(detail["input"], (dict, list)) else ""
    return f"{shown}: {detail['msg'][0].lower()}{detail['msg'][1:]}{hint}"


def _set_at(loaded: Loaded, section: str, message: str) -> list[str]:
    """Origins of the keys that a message about a section names as `key=value`."""
    start = f"{section}." if section else ""
    return list(dict.fromkeys(origin for key, origin in loaded.origins.items() if key.startswith(start)
                              and re.search(rf"(?<![\w.]){re.escape(key.removeprefix(start))}=", message)))


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."
