"""An inspection as one HTML file, which loads nothing: to be opened, sent or printed.

The text and the tables are in the page itself; what is shown of a chosen token stands as JSON in it, apart from the
script that reads it. Every text of a model or a stranger is escaped by Jinja or enters as the content of a node.
"""

from __future__ import annotations

from typing import Any

from qstar.inspection import page_parts as parts
from qstar.inspection.data import Inspection
from qstar.inspection.highlights import Place, extremes, level


def page(inspection: Inspection, *, thoughts: int = 20) -> str:
    """An inspection as an HTML page.

    Args:
        inspection: to show.
        thoughts: how many of the best thoughts are listed, and of the worst.
    """
    best, worst = extremes(inspection, thoughts)
    [difficulties] = parts.difficulty_charts(inspection)
    return parts.written(
        "page.html",
        "page.js",
        found=inspection,
        summary=inspection.summary,
        documents=parts.texts(inspection),
        best=[_ranked(place) for place in best],
        worst=[_ranked(place) for place in worst],
        legends=parts.OF_MODEL,
        gains=parts.gain_bars(inspection),
        weights=parts.weight_bars(inspection),
        difficulties=difficulties,
        data=page_data(inspection),
    )


def _ranked(place: Place) -> dict[str, Any]:
    """One of the best or worst thoughts."""
    return parts.place(*place) | {"position": place.position, "level": level(place.position.gain or 0.0)}


def page_data(inspection: Inspection) -> dict[str, Any]:
    """What the page's script shows of a token: texts by numbers in ``strings``, values to 5 significant digits."""
    number_of = parts.Strings()
    documents = parts.documents_data(inspection, number_of)
    return {"documents": documents, "strings": list(number_of.numbers)}
