"""The summary table, the figures and the HTML page of `report`."""
