"""Lessons 4 and 5: grade and classify radiographs, and say how sure the numbers are."""
