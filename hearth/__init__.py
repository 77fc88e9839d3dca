"""The parts that the stages share. `config.py` and `model.py` lie beside this folder: they are
there to be edited.
"""
