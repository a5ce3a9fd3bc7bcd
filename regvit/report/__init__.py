"""Comparisons for people: tables, plots, self-checks and the page about all runs; the picture of `look`, one image seen before and after.

What is compared is read from the long tables that the stages leave (`study`); a table is made once (`comparison`) and
rendered for a terminal, as Markdown or as HTML by one piece of code (`tables`). May import every room below it; only
`look`, which runs a model, imports torch.
"""
