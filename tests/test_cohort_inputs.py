"""Cohorts: which maps the inputs name, and what the outputs are called."""

import os
from pathlib import Path

import pytest

from gpuroi.cohort import _discover, find_maps


class TestDiscovery:
    @pytest.fixture
    def tree(self, tmp_path, monkeypatch):
        names = ["a.nii.gz", "b.nii", "sub/a.nii.gz", ".hidden/c.nii", "notes.txt", "sub/.d.nii"]
        for name in names:
            path = tmp_path / "tree" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        monkeypatch.chdir(tmp_path)
        return tmp_path / "tree"

    def stems(self, *inputs, **options):
        return [one.stem for one in find_maps(inputs, **options)]

    def test_folders_patterns_lists_and_files(self, tree):
        assert self.stems(tree) == ["a", "b", "sub/a"]
        assert self.stems("tree/*.nii*") == ["a", "b"]
        assert self.stems("tree/**/b.nii") == ["b"]
        Path("maps.txt").write_text("# two\ntree/b.nii\n\n  tree/a.nii.gz\n")
        assert self.stems("@maps.txt") == ["b", "a"]
        assert self.stems("missing.nii.gz") == ["missing"]
        Path("maps.txt").write_text("gone/\ntree/b.nii")
        assert self.stems("@maps.txt") == ["gone", "b"]
        Path("maps.txt").write_text("\ufefftree/gone-[1].nii\ntree/*.nii\n")
        assert self.stems("@maps.txt") == ["gone-[1]", "b"]

    def test_what_cannot_be_known_is_told(self, tree, monkeypatch):
        Path("maps.txt").write_text("@maps.txt\n")
        with pytest.raises(ValueError, match="is a list in a list"):
            find_maps(["@maps.txt"])

        def forbidden(folder, onerror, **options):
            onerror(PermissionError(13, "Permission denied", "tree/sub"))
            yield from ()

        monkeypatch.setattr(os, "walk", forbidden)
        with pytest.raises(ValueError, match=r"tree/sub cannot be looked into \(Permission denied"):
            find_maps([tree])

    def test_a_list_in_a_list_is_told_by_the_name_of_the_list(self, tree):
        Path("maps.txt").write_text("tree/b.nii\n@other.txt\n")
        with pytest.raises(ValueError, match=r"maps\.txt: @other\.txt is a list in a list"):
            find_maps(["@maps.txt"])

    def test_a_map_without_a_name_is_told(self, tree):
        (tree / "named").mkdir()
        (tree / "named" / ".nii.gz").touch()
        with pytest.raises(
            ValueError, match=r"\.nii\.gz has no name that its outputs could be cal"
        ):
            find_maps(["tree/named/.nii.gz"])

    def test_names_that_differ_by_case_alone(self, tree, monkeypatch):
        (tree / "B.nii").touch()
        assert self.stems(tree) == ["B", "a", "b", "sub/a"]
        monkeypatch.setattr(_discover, "_NAMES_IGNORE_CASE", True)
        with pytest.raises(ValueError, match="would both write"):
            find_maps([tree])

    def test_links_to_folders_are_followed_once(self, tree):
        (tree / "again").symlink_to(tree)
        (tree.parent / "elsewhere").mkdir()
        (tree.parent / "elsewhere" / "e.nii").touch()
        (tree / "linked").symlink_to(tree.parent / "elsewhere")
        assert self.stems(tree) == ["a", "b", "linked/e", "sub/a"]

    def test_each_file_once(self, tree):
        assert self.stems(tree, tree / "b.nii", "tree") == ["a", "b", "sub/a"]

    def test_maps_of_one_name_keep_the_folders_that_tell_them_apart(self, tree):
        assert self.stems("tree/a.nii.gz", "tree/sub/a.nii.gz", "tree/b.nii") == ["a", "sub/a", "b"]
        for name in ("sub-01/spm/T.nii", "sub-02/spm/T.nii", "sub-02/spm/F.nii"):
            Path("glm", name).parent.mkdir(parents=True, exist_ok=True)
            Path("glm", name).touch()
        assert self.stems("glm/sub-*/spm/T.nii") == ["sub-01/spm/T", "sub-02/spm/T"]
        Path("maps.txt").write_text("glm/sub-02/spm/T.nii\nglm/sub-02/spm/F.nii\n")
        assert self.stems("@maps.txt") == ["T", "F"]
        assert self.stems("@maps.txt", "glm/sub-01/spm/T.nii") == [
            "sub-02/spm/T",
            "sub-02/spm/F",
            "sub-01/spm/T",
        ]

    def test_two_ways_to_a_file_are_one(self, tree):
        (tree / "sub" / "up").symlink_to(tree)
        (tree / "link.nii").symlink_to("b.nii")
        assert self.stems("tree/b.nii", "tree/sub/up/b.nii") == ["b"]
        assert self.stems("tree/b.nii", "tree/link.nii") == ["b", "link"]  # two names on purpose

    def test_two_maps_of_one_name_are_refused(self, tree):
        (tree / "b.nii.gz").touch()
        with pytest.raises(
            ValueError, match=r"both write b_desc-\S+; leave one of them out, or ext"
        ):
            find_maps([tree])
        (tree / "b.nii.gz").unlink()
        (tree.parent / "other").mkdir()
        (tree.parent / "other" / "b.nii").touch()
        with pytest.raises(ValueError, match=r"would both write b_desc-\S+; extract them into sep"):
            find_maps([tree, "other"])

    def test_names_may_be_of_any_bytes_and_case(self, tree):
        (tree / "b.nii").rename(tree / "b\udce9.NII")
        assert self.stems(tree) == ["a", "b\udce9", "sub/a"]
        Path("maps.txt").write_bytes(b"tree/b\xe9.NII\n")
        assert self.stems("@maps.txt") == ["b\udce9"]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"shard": "1/2"}, r"shard='1/2' is not a pair of integers; pass \(3, 16\) for 3/16"),
            ({"shard": (1, 2, 3)}, "is not a pair of integers"),
            ({"entities": {"sub": [1]}}, "sub=1 is a int; pass labels as they are in file names"),
        ],
    )
    def test_wrong_types_are_told(self, tree, options, message):
        with pytest.raises(TypeError, match=message):
            find_maps([tree], **options)

    @pytest.mark.parametrize("source", ["nothing-*.nii", "empty"])
    def test_what_names_nothing_is_told(self, tree, source):
        Path("empty").mkdir()
        with pytest.raises(ValueError, match="there is no map here"):
            find_maps([source])

    @pytest.mark.parametrize("source", ["nowhere", "nowhere/", "tree/c", ""])
    def test_folders_that_do_not_exist_are_told(self, tree, source):
        with pytest.raises(ValueError, match=f"{source}: there is no such file or folder"):
            find_maps([source])

    def test_shards_part_the_maps(self, tree):
        whole = self.stems(tree)
        parts = [self.stems(tree, shard=(i, 2)) for i in (1, 2)]
        assert sorted(parts[0] + parts[1]) == whole
        assert not set(parts[0]) & set(parts[1])
        assert self.stems(tree, limit=2) == whole[:2]
        with pytest.raises(ValueError, match="shard 3/2 does not exist"):
            find_maps([tree], shard=(3, 2))

    def test_bids_derivatives(self, tmp_path):
        folder = tmp_path / "fitlins"
        names = [
            "sub-01/func/sub-01_task-motor_contrast-left_stat-t_statmap.nii.gz",
            "sub-01/func/sub-01_task-motor_contrast-left_stat-z_statmap.nii.gz",
            "sub-02/func/sub-02_task-rest_contrast-left_stat-t_statmap.nii.gz",
            "sub-01/func/sub-01_task-motor_desc-preproc_bold.nii.gz",
            "sub-01/anat/sub-01_T1w.nii.gz",
        ]
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()
        (folder / "dataset_description.json").write_text("{}")
        assert len(self.stems(folder)) == 3
        assert self.stems(folder, entities={"sub": ["01"], "stat": ["t"]}) == [
            "sub-01/func/sub-01_task-motor_contrast-left_stat-t_statmap"
        ]
        assert len(self.stems(folder, entities={"sub": ["sub-01", "sub-02"], "stat": ["t"]})) == 2
        with pytest.raises(ValueError, match="no map has task-memory"):
            find_maps([folder], entities={"task": ["memory"]})
