"""The catalogue: the shipped rows say where they are from, and no bad row is taken."""

from __future__ import annotations

import csv
import datetime
from pathlib import Path

import pytest

from cloudlm.control.catalogue.files import load_catalogue, shipped, write_offers
from cloudlm.control.catalogue.skypilot import read_published
from cloudlm.control.catalogue.words import (
    DEVICE_COLUMNS,
    OFFER_COLUMNS,
    Device,
    Kind,
    Offer,
    offer_cells,
    read_devices,
    read_offers,
    read_regions,
)
from cloudlm.core.errors import InvalidRequest, NotFound

DEVICES = {
    "L4": Device("L4", Kind.GPU, 24, 300, 121),
    "H100-SXM": Device("H100-SXM", Kind.GPU, 80, 3350, 990),
    "vCPU": Device("vCPU", Kind.CPU, 0, 3, 0.2),
}
GOOD = "aws,g6.xlarge,L4,1,4,16,us-east-1,0.8048,a=0.3 b=0.4,https://x.example/,,2026-11-22,"


def rows(*lines: str) -> str:
    return "\n".join([",".join(OFFER_COLUMNS), *lines]) + "\n"


class TestShipped:
    def test_there_are_offers_that_a_user_would_choose(self) -> None:
        market = load_catalogue()
        providers = {offer.provider for offer in market.offers}
        assert {"aws", "gcp", "azure", "alibaba"} < providers
        assert {"lambda", "runpod", "coreweave", "vast"} < providers
        assert len(market.offers) >= 60
        kinds = {market.devices[offer.device].kind for offer in market.offers}
        assert kinds == {Kind.GPU, Kind.CPU}

    @pytest.mark.parametrize("name", ["offers.csv", "devices.csv", "regions.csv"])
    def test_every_row_says_where_and_when_it_was_read(self, name: str) -> None:
        with (shipped() / name).open(encoding="utf-8", newline="") as lines:
            for row in csv.DictReader(lines):
                assert row["source"].startswith(("https://", "http://")), row
                assert datetime.date.fromisoformat(row["read_on"]) >= datetime.date(2026, 1, 1)

    def test_prices_are_plausible(self) -> None:
        for offer in load_catalogue().offers:
            for price in (offer.on_demand, *offer.spot.values()):
                assert price is None or 0.01 < price / offer.count < 30, offer.key
            assert offer.as_of <= offer.read_on

    def test_places_with_zones_are_known(self) -> None:
        market = load_catalogue()
        assert all(offer.place in market.regions for offer in market.offers if len(offer.zones) > 1)


class TestRows:
    def test_a_row_is_read_and_written_back(self) -> None:
        (offer,) = read_offers(rows(GOOD), "offers.csv", DEVICES)
        assert offer.spot == {"a": 0.3, "b": 0.4}
        assert offer.zones == ("a", "b")
        assert offer.key == "aws/us-east-1/g6.xlarge"
        assert read_offers(rows(",".join(offer_cells(offer))), "x", DEVICES) == (offer,)

    def test_one_spot_price_is_the_regions(self) -> None:
        (offer,) = read_offers(rows(GOOD.replace("a=0.3 b=0.4", "0.35")), "x", DEVICES)
        assert offer.spot == {"us-east-1": 0.35}
        assert read_offers(rows(",".join(offer_cells(offer))), "x", DEVICES) == (offer,)

    @pytest.mark.parametrize(
        ("old", "new", "column"),
        [
            ("L4", "L9", "device"),
            ("0.8048", "cheap", "on_demand_usd_per_h"),
            ("0.8048", "-1", "on_demand_usd_per_h"),
            ("0.8048", "nan", "on_demand_usd_per_h"),
            ("a=0.3", "a=x", "spot_usd_per_h"),
            ("https://x.example/", "", "source"),
            ("2026-11-22", "yesterday", "read_on"),
            ("2026-11-22", "2026-13-45", "read_on"),
            ("L4,1", "L4,0", "count"),
            ("us-east-1", "", "region"),
            ("aws", " ", "provider"),
            ("L4,1,4,16", "vCPU,4,4,", "ram_gib"),
            ("0.8048,a=0.3 b=0.4", ",", "on_demand_usd_per_h"),
        ],
    )
    def test_a_bad_cell_is_named(self, old: str, new: str, column: str) -> None:
        with pytest.raises(InvalidRequest, match=f"offers.csv, line 2: {column}") as caught:
            read_offers(rows(GOOD.replace(old, new, 1)), "offers.csv", DEVICES)
        assert caught.value.param == column

    def test_an_offer_twice_or_a_missing_column(self) -> None:
        with pytest.raises(InvalidRequest, match="offered twice"):
            read_offers(rows(GOOD, GOOD), "x", DEVICES)
        with pytest.raises(InvalidRequest, match="no column source"):
            read_offers(rows(GOOD).replace("source", "origin"), "x", DEVICES)
        with pytest.raises(InvalidRequest, match="the first line"):
            read_offers("", "x", DEVICES)

    def test_devices_and_regions(self) -> None:
        line = "L4,gpu,24,300,121,peak,https://x.example/,2026-11-22,"
        head = ",".join(DEVICE_COLUMNS)
        assert read_devices(f"{head}\n{line}\n", "x")["L4"].memory_gib == 24
        with pytest.raises(InvalidRequest, match="named twice"):
            read_devices(f"{head}\n{line}\n{line}\n", "x")
        with pytest.raises(InvalidRequest, match="must be one of"):
            read_devices(f"{head}\n{line.replace('gpu', 'tpu')}\n", "x")
        regions = "provider,region,area,latitude,longitude,source,read_on\naws,r,eu/de,91,0,s,d\n"
        with pytest.raises(InvalidRequest, match="latitude"):
            read_regions(regions, "x")


class TestFiles:
    def test_a_folder_takes_the_place_of_the_shipped_offers(self, tmp_path: Path) -> None:
        offer = Offer(
            "aws", "g6.xlarge", "L4", 1, "us-east-1", 1.0, source="s", read_on="2026-01-01"
        )
        path = write_offers([offer], tmp_path / "own")
        assert path.read_text().startswith("provider,")
        assert load_catalogue(tmp_path / "own").offers == (offer,)
        assert load_catalogue(tmp_path / "own").devices == load_catalogue().devices

    def test_no_folder_and_no_text(self, tmp_path: Path) -> None:
        with pytest.raises(NotFound, match="no folder"):
            load_catalogue(tmp_path / "none")
        (tmp_path / "offers.csv").write_bytes(b"\xff\xfe")
        with pytest.raises(InvalidRequest, match="cannot be read"):
            load_catalogue(tmp_path)


class TestPublishedLists:
    HEAD = (
        "InstanceType,AcceleratorName,AcceleratorCount,vCPUs,MemoryGiB,GpuInfo,Price,SpotPrice,"
        "Region,AvailabilityZone\n"
    )
    LINES = (
        "p5.48xlarge,H100,8.0,192.0,2048.0,{},98.32,29.9,us-east-1,use1-az1\n"
        "p5.48xlarge,H100,8.0,192.0,2048.0,{},98.32,27.5,us-east-1,use1-az2\n"
        "p5.48xlarge,H100,8.0,192.0,2048.0,{},98.32,,us-east-1,use1-az3\n"
        "g6.xlarge,L4,1.0,4.0,16.0,{},0.8048,,us-east-1,use1-az1\n"
        "m5.large,,,2.0,8.0,,0.096,0.03,us-east-1,use1-az1\n"
        "p2.xlarge,K80,1.0,4.0,61.0,{},0.9,0.2,us-east-1,use1-az1\n"
        "g6f.large,L4,0.125,2.0,8.0,{},0.2,0.1,us-east-1,use1-az1\n"
    )

    def read(self, text: str) -> tuple[tuple[Offer, ...], int]:
        found = read_published(text, "aws", DEVICES, source="vms.csv", read_on="2026-11-22")
        return found.offers, found.passed_over

    def test_zones_become_one_offer(self) -> None:
        (big, small), passed_over = self.read(self.HEAD + self.LINES)
        assert big.spot == {"use1-az1": 29.9, "use1-az2": 27.5}
        assert (big.count, big.on_demand, big.device) == (8, 98.32, "H100-SXM")
        assert small.spot == {}
        assert passed_over == 3

    @pytest.mark.parametrize(
        ("old", "new"),
        [("98.32", "much"), ("98.32", "-2"), ("8.0,192", "inf,192"), ("27.5", "nan")],
    )
    def test_a_bad_number_is_named(self, old: str, new: str) -> None:
        with pytest.raises(InvalidRequest, match=r"line [23]: .* not a number"):
            self.read(self.HEAD + self.LINES.replace(old, new))

    def test_another_file_is_refused(self) -> None:
        with pytest.raises(InvalidRequest, match="no list in SkyPilot's form"):
            self.read("a,b\n1,2\n")
