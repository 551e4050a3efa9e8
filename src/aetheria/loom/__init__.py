"""How what a run says travels and is kept: the recorder of metrics, events and notes. No torch in here."""
