"""What public sets call classes, splits and patients has one name each here."""

import pytest

from genailab_helpers.datasets import names
from genailab_helpers.datasets.names import GRADE_NAMES, GRADES, canonical_class, canonical_classes


@pytest.mark.parametrize(("aliases", "name"), [
    (["grade_0", "grade 0", "Grade-0", "GRADE0"], "grade_0"),
    (["NORMAL", "Normal", "No_findings", "No Finding", "no-finding"], "Normal"),
    (["PNEUMONIA", "Pneumonia"], "Pneumonia"),
    (["COVID", "Covid-19", "COVID_19", "covid19"], "COVID"),
    (["Lung", "Lung_Opacity", "Lung Opacity"], "Lung_Opacity"),
    (["Viral", "Viral Pneumonia", "viral_pneumonia"], "Viral Pneumonia"),
    (["Shoulder 5"], "Shoulder 5")])
def test_class_aliases(aliases, name):
    for graded in (False, True):
        assert {canonical_class(alias, graded) for alias in aliases} == {name}


@pytest.mark.parametrize(("alias", "grade"), [
    ("0", "grade_0"), ("Healthy", "grade_0"), ("0Healthy", "grade_0"), ("healthy", "grade_0"),
    ("4", "grade_4"), ("Severe", "grade_4"), ("4 - severe", "grade_4")])
def test_numbers_and_words_are_grades_where_that_is_known(alias, grade):
    assert canonical_class(alias, graded=True) == grade
    assert canonical_class(alias) == alias


@pytest.mark.parametrize(("given", "classes"), [
    ("01234", GRADES), (GRADE_NAMES, GRADES), (["0", "1", "grade 2", "Moderate", "4Severe"], GRADES),
    ("0123", "0123"), ("012345", "012345"), (["Healthy", "COVID"], ["Healthy", "COVID"])])
def test_only_names_of_all_five_grades_tell_what_a_number_is(given, classes):
    assert canonical_classes(given) == dict(zip(given, classes, strict=True))
    assert canonical_classes(given, graded=True)[given[0]] == "grade_0"


def test_classes_are_ordered_by_grade_then_finding_then_alphabet():
    assert names.sort_classes(["zebra", "COVID", "Normal", "grade_3", "ape", "grade_1", "COVID"]) == [
        "grade_1", "grade_3", "Normal", "COVID", "ape", "zebra"]


def test_splits():
    for aliases, name in ((("train", "Training"), "train"), (("VAL", "valid", "validation"), "val"),
                          (("test", "testing"), "test"), (("tests", "dev", ""), "")):
        assert {names.canonical_split(alias) for alias in aliases} == {name}


@pytest.mark.parametrize(("file_name", "patient"), [
    ("person12_virus_33.jpeg", "person12"), ("person12_bacteria_4.jpeg", "person12"),
    ("NORMAL2-IM-0381-0001.jpeg", "NORMAL2-IM-0381"), ("IM-0115-0001.jpeg", "IM-0115"),
    ("IM-0519-0001-0001.jpeg", "IM-0519"), ("00000061_012.jpg", "00000061"), ("9003316L.png", "9003316"),
    ("9003316R.jpg", "9003316"), ("case012_0.jpg", "case012"), ("COVID-17.png", ""), ("image.png", ""),
    ("9003316Left.jpg", ""), ("00000061_0123.jpg", "")])
def test_patients_by_the_rules_of_public_sets(file_name, patient):
    assert names.known_patient(file_name) == patient
