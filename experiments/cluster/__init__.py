"""The processes of a run that has several, on one machine or on many."""
