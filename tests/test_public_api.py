"""The public names are those of `__all__`, every one resolves, and nothing else shows."""

import mlx_vlm_pipes


def test_all_names_resolve_and_are_sorted() -> None:
    assert mlx_vlm_pipes.__all__ == sorted(mlx_vlm_pipes.__all__)
    for name in mlx_vlm_pipes.__all__:
        assert getattr(mlx_vlm_pipes, name).__name__ == name
    assert set(dir(mlx_vlm_pipes)) == {*mlx_vlm_pipes.__all__, "__version__"}
