"""Example images in the report."""

import base64
import io
from collections.abc import Sequence
from html import escape

from PIL import Image

from coin.reporting import markup
from coin.reporting.extras import Examples

_OPEN = 24
"""So many images with differing answers are shown at once; the others open on a click."""


def example_images(examples: Examples) -> str:
    """Return example images by task, first those where the decoded answer differs from the expert's."""
    differing = examples.expert != examples.decoded
    parts = [_how(examples)]
    for task, indices in examples.by_task().items():
        wrong = [i for i in indices if differing[i]]
        right = [i for i in indices if not differing[i]]
        parts.append(f"<h3>Task {escape(task)} lost</h3>" if task else "")
        parts.append(_images(examples, [*wrong[:_OPEN], *right]))
        more = len(wrong) - _OPEN
        parts.append(markup.folded(f"{more} more whose answers differ", _images(examples, wrong[_OPEN:])))
    return "".join(parts) if len(examples.images) else ""


def _how(examples: Examples) -> str:
    what = f"Decoded by {examples.method}, decoder {examples.decoder}" if examples.method else "Decoded answers"
    why = f": {examples.choice}" if examples.choice else ""
    text = f"{what}{why}. Framed where the decoded answer differs from the expert's; a few where they agree follow."
    return f'<p class="soft">{escape(text)}</p>'


def _images(examples: Examples, indices: Sequence[int]) -> str:
    if not indices:
        return ""
    return f'<div class="examples">{"".join(_image(examples, i) for i in indices)}</div>'


def _image(examples: Examples, i: int) -> str:
    buffer = io.BytesIO()
    Image.fromarray(examples.images[i]).save(buffer, format="PNG", optimize=True)
    label, expert, decoded = (
        escape(examples.name_of(int(answers[i]))) for answers in (examples.label, examples.expert, examples.decoded)
    )
    kind = "differs" if examples.expert[i] != examples.decoded[i] else "same"
    place = f' title="test image {int(examples.position[i])}"' if examples.position else ""
    return (
        f'<figure class="{kind}"{place}><img alt="test image of class {label}" loading="lazy" '
        f'src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
        f"<figcaption>is {label}<br>expert {expert}<br>decoded {decoded}</figcaption></figure>"
    )
