"""A page to look at: a table, its cells, their runs, and every answer, in a folder that opens by a double click.

items.py       the answers of a run to one task, from completions, grades, judgements and predictions
runs.py        what a page tells of a run: settings, scores, curves, versions, command, files
view.py        a report's table as the page shows it, and the items behind its paired tests
loose.py       runs of no table: a table made of them
scripts.py     values as script files (file:// forbids fetch), and the libraries' files from their packages
build.py       all of it written: index.html, data/, lib/, figures/
templates/     a template a view
static/        the page's own style and scripts

Nothing in a page is ever parsed as HTML or run but these scripts: texts of runs reach the document as text only.
"""
