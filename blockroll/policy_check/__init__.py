"""Is a checkpoint decoded losslessly?"""
