def figure(*a):
    from matplotlib.figure import Figure
    return Figure()
