"""Sentences made of class names: templates of the methods, and sets of templates to average."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kineticlip.runtime.errors import UserError, did_you_mean

TEMPLATES = {
    "text4vis": "a video of a person {}.",
    "bike": "This is a video about {}",
    "name": "{}",
}

# CLIP's own prompts for Kinetics: four media times seven ways of naming the action.
_MEDIA = ("a photo of", "a video of", "a example of", "a demonstration of")
_VERBS = ("using", "doing", "during", "performing", "practicing")
_ACTIONS = ("{}", "a person {}", *(f"a person {verb} {{}}" for verb in _VERBS))

# ActionCLIP's sixteen, whose wording decides its numbers.
_ACTIONCLIP = (
    *(f"a {picture} of action {{}}" for picture in ("photo", "picture")),
    "Human action of {}",
    *(f"{{}}{ending}" for ending in (", an action", " this is an action", ", a video of action")),
    "Playing action of {}",
    "{}",
    *(f"{verb} a kind of action, {{}}" for verb in ("Playing", "Doing")),
    "Look, the human is {}",
    "Can you recognize the action of {}?",
    *(f"{medium} of {{}}" for medium in ("Video classification", "A video")),
    *(f"The {who} is {{}}" for who in ("man", "woman")),
)

ENSEMBLES = {
    "actionclip": _ACTIONCLIP,
    "clip-kinetics": tuple(f"{medium} {action}." for medium in _MEDIA for action in _ACTIONS),
}


def render(template: str, names: Iterable[str]) -> list[str]:
    """The sentence of every class name; UserError unless the template holds one `{}`.

    Names go in verbatim: UCF101's `ApplyEyeMakeup` stays one word, as in the official code.
    """
    if template.count("{}") != 1:
        raise UserError(f"template {template!r}: expected exactly one {{}} for the class name")
    return [template.replace("{}", name) for name in names]


def expand_templates(templates: Sequence[str]) -> tuple[str, ...]:
    """The templates with names of TEMPLATES and ENSEMBLES replaced by what they stand for."""
    known = {**{name: (text,) for name, text in TEMPLATES.items()}, **ENSEMBLES}
    expanded: list[str] = []
    for template in templates:
        if "{}" not in template and template not in known:
            raise UserError(
                f"template {template!r}: no {{}} for the class name and no template of that name. "
                f"{did_you_mean(template, known)}"
            )
        expanded += known.get(template, (template,))
    return tuple(expanded)
