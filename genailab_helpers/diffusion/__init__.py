"""Lesson 3: learn to draw chest X-rays from noise, and judge what was drawn."""
