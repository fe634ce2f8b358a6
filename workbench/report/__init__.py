"""The report of a run: one static HTML file that says in plain words what was done and found."""

from workbench.report.report import summary_table, write_report

__all__ = ["summary_table", "write_report"]
