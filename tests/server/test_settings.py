"""Settings: every variable reaches the record it is for, what cannot be is refused, and the documents know them all."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from kontextd_models import EngineConfig, LoraLimits, MemoryMode, SafetyConfig
from kontextd_server.api import ApiConfig, Listening
from kontextd_server.fetch import AllowList, FetchConfig, Proxy, PurposeRules
from kontextd_server.fetch.roots import LoraRoots
from kontextd_server.fetch.rules import IMAGE_RULES, LORA_RULES, WEBHOOK_RULES
from kontextd_server.files import FolderLimits
from kontextd_server.settings import SettingError, Settings, describe, names_of, read_settings, variable
from kontextd_server.settings.engine import EngineSettings
from kontextd_server.settings.fetching import FetchSettings
from kontextd_server.settings.http import HttpSettings
from kontextd_server.settings.work import WorkSettings
from kontextd_server.store import Policy
from kontextd_server.wire.addresses import AddressSettings
from kontextd_server.wire.cors import CorsSettings
from kontextd_server.wire.hosts import HostNames
from kontextd_server.wire.json_bodies import JsonLimits
from kontextd_server.wire.proxy import Lending
from kontextd_server.worker import DeliveryPolicy, StageDeadlines, SupervisorPolicy, WorkerPolicy

PARTS = (EngineSettings, HttpSettings, FetchSettings, WorkSettings)
DOCS = Path(__file__).parents[2] / "docs"
CACHE = Path("/cache")
MIB = 2**20


def said(**values: str) -> Settings:
    return read_settings({variable(name): text for name, text in values.items()})


# Without variables.


def test_without_variables_all_is_as_by_default() -> None:
    assert read_settings({"PATH": "/bin", "KONTEXTD_MODEL": "", "KONTEXTD_DEVICE": " "}) == Settings()


def test_without_variables_every_layer_works_by_its_own_defaults() -> None:
    """So that a number that stands in two places is the same in both."""
    settings = Settings()
    assert settings.engine_config() == EngineConfig()
    assert settings.store_policy() == Policy()
    assert settings.folder_limits() == FolderLimits()
    assert settings.worker_policy(settings.drain_s) == WorkerPolicy()
    assert settings.supervisor_policy(settings.drain_s) == SupervisorPolicy()
    assert settings.delivery_policy(settings.result_report) == DeliveryPolicy()
    assert settings.fetch_config(CACHE, settings.max_image_mib, settings.max_lora_mib) == FetchConfig(CACHE)
    assert settings.roots(CACHE) == LoraRoots({"library": CACHE})
    assert settings.address_settings() == AddressSettings()
    assert (settings.host, settings.port) == (Listening().host, Listening().port)
    assert (settings.tls_cert, settings.tls_key) == (None, None)


def test_without_variables_the_api_works_by_its_own_defaults_and_takes_the_largest_image_in_a_body() -> None:
    config = Settings().api_config("0", Settings().max_lora_scale)
    body = config.limits.body
    assert body == replace(JsonLimits(), max_bytes=body.max_bytes)
    assert body.max_bytes == JsonLimits.for_files(IMAGE_RULES.max_bytes).max_bytes
    assert replace(config, limits=replace(config.limits, body=JsonLimits())) == ApiConfig()


def test_the_supervisor_waits_longer_at_the_end_than_its_workers_may_take() -> None:
    for drain_s in (1.0, 20.0, 600.0):
        assert Settings().supervisor_policy(drain_s).stop_s > Settings().worker_policy(drain_s).stop_s


def test_the_data_folder_is_the_users_own_unless_one_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/anna")
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    assert Settings().data_folder == Path("/home/anna/.local/share/kontextd")
    monkeypatch.setenv("XDG_DATA_HOME", "relative")  # the specification has such a one ignored
    assert Settings().data_folder == Path("/home/anna/.local/share/kontextd")
    monkeypatch.setenv("XDG_DATA_HOME", "/xdg")
    assert Settings().data_folder == Path("/xdg/kontextd")
    assert said(data="~/box").data_folder == Path("/home/anna/box")


# With variables.

Reached = Callable[[Settings], object]


def safety(settings: Settings) -> SafetyConfig:
    return settings.engine_config().safety


def fetching(settings: Settings) -> FetchConfig:
    return settings.fetch_config(CACHE, settings.max_image_mib, settings.max_lora_mib)


def api(settings: Settings) -> ApiConfig:
    return settings.api_config("1.2", settings.max_lora_scale)


def lora_limits(settings: Settings) -> LoraLimits:
    return settings.engine_config().lora_limits


def deadlines(settings: Settings) -> StageDeadlines:
    return settings.worker_policy(1.0).deadlines


PROXY = "http://user:secret@proxy.lan:3128"
LISTED = {"fetch_allow_image": "*.lan", "fetch_allow_lora": "*.lan", "fetch_allow_webhook": "*.lan"}
REACHES: dict[str, tuple[str, Reached, object]] = {
    "model": ("/models/kontext", lambda s: s.engine_config().model, Path("/models/kontext")),
    "device": ("cuda:1", lambda s: s.engine_config().device, "cuda:1"),
    "dtype": ("float32", lambda s: s.engine_config().dtype, "float32"),
    "memory_mode": ("group_offload", lambda s: s.engine_config().memory_mode, MemoryMode.GROUP_OFFLOAD),
    "max_area": ("1048576", lambda s: s.engine_config().max_area, 1048576),
    "presets": ("/etc/presets.json", lambda s: s.engine_config().presets, Path("/etc/presets.json")),
    "precision": ("fp8", lambda s: s.engine_config().precision, "fp8"),
    "compile": ("off", lambda s: s.engine_config().compile, "off"),
    "compile_cache": ("/srv/compiled", lambda s: s.engine_config(CACHE).compile_cache, Path("/srv/compiled")),
    "attention": ("cudnn", lambda s: s.engine_config().attention, "cudnn"),
    "kernels": ("on", lambda s: s.engine_config().kernels, "on"),
    "prompt_cache_mib": ("1", lambda s: s.engine_config().prompt_cache_bytes, MIB),
    "reference_cache_mib": ("0", lambda s: s.engine_config().reference_cache_bytes, 0),
    "safety_checkers": ("embedded, /models/vit", lambda s: safety(s).checkers, ("embedded", "/models/vit")),
    "safety_threshold": ("0.5", lambda s: safety(s).threshold, 0.5),
    "safety_check_inputs": ("yes", lambda s: safety(s).check_inputs, True),
    "safety_forced": ("1", lambda s: safety(s).forced, True),
    "safety_time_limit_s": ("2.5", lambda s: safety(s).time_limit_s, 2.5),
    "log_level": ("DEBUG", lambda s: s.log_level, "DEBUG"),
    "debug": ("1", lambda s: s.debug, True),
    "host": ("0.0.0.0", lambda s: s.host, "0.0.0.0"),
    "port": ("0", lambda s: s.port, 0),
    "tls_cert": ("/tls/server.pem", lambda s: s.tls_cert, Path("/tls/server.pem")),
    "tls_key": ("/tls/key.pem", lambda s: s.tls_key, Path("/tls/key.pem")),
    "public_url": ("https://box.lan/k/", lambda s: api(s).door.addresses.public_url, "https://box.lan/k"),
    "trusted_proxies": ("10.0.0.0/8, unix", lambda s: api(s).door.addresses.trusted_proxies, ("10.0.0.0/8", "unix")),
    "cors_origins": ("https://app.lan", lambda s: api(s).door.cors, CorsSettings(("https://app.lan",))),
    "cors_private_network": ("1", lambda s: api(s).door.cors, CorsSettings(private_network=True)),
    "proxy_key": ("id:secret", lambda s: api(s).door.lending, Lending("id:secret", frozenset())),
    "proxy_origins": ("https://app.lan", lambda s: s.proxy_origins, ("https://app.lan",)),
    "run_hosts": ("Run.lan", lambda s: api(s).door.addresses.names.run, ("run.lan",)),
    "queue_hosts": ("queue.lan,q.lan", lambda s: api(s).door.addresses.names.queue, ("queue.lan", "q.lan")),
    "rest_hosts": ("rest.lan", lambda s: api(s).door.addresses.names.rest, ("rest.lan",)),
    "files_hosts": ("files.lan", lambda s: api(s).door.addresses.names.files, ("files.lan",)),
    "plain_hosts": ("queue.box.lan", lambda s: api(s).door.addresses.names.plain, ("queue.box.lan",)),
    "drain_s": ("7", lambda s: api(s).drain_s, 7.0),
    "max_image_mib": ("7", lambda s: (fetching(s).image.max_bytes, api(s).limits.body.max_bytes), (7 * MIB, 10835286)),
    "max_json_depth": ("5", lambda s: api(s).limits.body.max_depth, 5),
    "max_json_values": ("6", lambda s: api(s).limits.body.max_nodes, 6),
    "max_images": ("2", lambda s: api(s).limits.max_images, 2),
    "max_loras": ("0", lambda s: api(s).limits.max_loras, 0),
    "requests_per_minute": ("1.5", lambda s: api(s).limits.requests_per_minute, 1.5),
    "request_burst": ("3", lambda s: api(s).limits.burst, 3),
    "result_report": ("0", lambda s: api(s).with_report, False),
    "key_memory_s": ("9", lambda s: api(s).key_memory_s, 9.0),
    "upload_grant_s": ("60", lambda s: api(s).grant_s, 60.0),
    "offline": ("on", lambda s: fetching(s).offline, True),
    "fetch_allow_image": ("*.lan,::1", lambda s: fetching(s).image.allow, AllowList.parse(["*.lan", "::1"])),
    "fetch_allow_lora": ("nas.lan", lambda s: fetching(s).lora.allow, AllowList.parse(["nas.lan"])),
    "fetch_allow_webhook": ("hook.lan", lambda s: fetching(s).webhook.allow, AllowList.parse(["hook.lan"])),
    "fetch_proxy_image": (PROXY, lambda s: fetching(s).image.proxy, Proxy.parse(PROXY)),
    "fetch_proxy_lora": (PROXY, lambda s: fetching(s).lora.proxy, Proxy.parse(PROXY)),
    "fetch_proxy_webhook": (PROXY, lambda s: fetching(s).webhook.proxy, Proxy.parse(PROXY)),
    "fetch_ca_bundle": (__file__, lambda s: fetching(s).ca_bundle, Path(__file__)),
    "fetch_image_timeout_s": ("3", lambda s: fetching(s).image.total_s, 3.0),
    "fetch_lora_timeout_s": ("4", lambda s: fetching(s).lora.total_s, 4.0),
    "max_lora_mib": ("5", lambda s: (fetching(s).lora.max_bytes, lora_limits(s).max_file_bytes), (5 * MIB, 5 * MIB)),
    "max_lora_tensors": ("7", lambda s: lora_limits(s).max_tensors, 7),
    "max_lora_rank": ("8", lambda s: lora_limits(s).max_rank, 8),
    "max_lora_scale": ("2", lambda s: (lora_limits(s).max_scale, api(s).limits.max_lora_scale), (2.0, 2.0)),
    "lora_memory_mib": ("9", lambda s: s.engine_config().lora_cache_bytes, 9 * MIB),
    "lora_device_memory_mib": ("0", lambda s: s.engine_config().lora_device_cache_bytes, 0),
    "lora_merged_memory_mib": ("0", lambda s: s.engine_config().lora_merged_cache_bytes, 0),
    "lora_roots": (
        "studio=/srv/loras, team=/mnt/x",
        lambda s: s.roots(CACHE),
        LoraRoots({"studio": Path("/srv/loras"), "team": Path("/mnt/x"), "library": CACHE}),
    ),
    "hub_ids": ("1", lambda s: fetching(s).hub_ids, True),
    "hub_token": ("hf_x", lambda s: fetching(s).hub_token, "hf_x"),
    "max_overtaken": ("3", lambda s: s.store_policy().affinity_window, 4),
    "lora_cache_mib": ("6", lambda s: fetching(s).cache_bytes, 6 * MIB),
    "hub_url": ("https://hub.lan/", lambda s: fetching(s).hub, "https://hub.lan"),
    "data": ("/srv/kontextd", lambda s: s.data_folder, Path("/srv/kontextd")),
    "database": ("postgresql://h/d", lambda s: s.database, "postgresql://h/d"),
    "files": ("/mnt/files", lambda s: s.files_folder, Path("/mnt/files")),
    "api_keys": ("a=id:one,b=x=y", lambda s: s.api_keys, ("a=id:one", "b=x=y")),
    "workers": ("0", lambda s: s.workers, 0),
    "preview_interval": ("4", lambda s: s.worker_policy(1.0).preview_interval, 4),
    "run_limit_s": ("5", lambda s: s.worker_policy(1.0).run_limit_s, 5.0),
    "max_queue_length": ("6", lambda s: s.store_policy().max_queue_length, 6),
    "max_queued_per_key": ("7", lambda s: s.store_policy().max_queued_per_owner, 7),
    "jobs_kept_s": ("8", lambda s: s.store_policy().finished_jobs_s, 8.0),
    "sync_results_kept_s": ("9", lambda s: s.store_policy().transient_result_s, 9.0),
    "files_kept_s": ("10", lambda s: s.folder_limits(), FolderLimits(default_lifetime_s=10.0, max_lifetime_s=10.0)),
    "files_quota_mib": ("11", lambda s: s.folder_limits().quota_bytes, 11 * MIB),
    "max_file_mib": ("12", lambda s: s.folder_limits().max_file_bytes, 12 * MIB),
    "webhook_retry_delays_s": ("1, 2.5", lambda s: s.delivery_policy(True).retry_delays_s, (1.0, 2.5)),
    "lease_s": ("13", lambda s: s.store_policy().lease_s, 13.0),
    "stage_load_s": ("21", lambda s: deadlines(s).load_s, 21.0),
    "stage_warm_up_s": ("22", lambda s: deadlines(s).warm_up_s, 22.0),
    "stage_claim_s": ("23", lambda s: deadlines(s).claim_s, 23.0),
    "stage_fetch_s": ("24", lambda s: deadlines(s).fetch_s, 24.0),
    "stage_open_s": ("25", lambda s: deadlines(s).open_s, 25.0),
    "stage_merge_s": ("26", lambda s: deadlines(s).merge_s, 26.0),
    "stage_compile_s": ("27", lambda s: deadlines(s).compile_s, 27.0),
    "stage_step_s": ("28", lambda s: deadlines(s).step_s, 28.0),
    "stage_decode_s": ("29", lambda s: deadlines(s).decode_s, 29.0),
    "stage_save_s": ("30", lambda s: deadlines(s).save_s, 30.0),
    "stage_finish_s": ("31", lambda s: deadlines(s).finish_s, 31.0),
    "worker_silence_s": ("32", lambda s: s.worker_silence_s, 32.0),
    "log_json": ("1", lambda s: s.log_json, True),
}


@pytest.mark.parametrize("name", names_of(Settings))
def test_every_variable_reaches_the_record_it_is_for(name: str) -> None:
    text, reached, expected = REACHES[name]
    needed = LISTED if name.startswith("fetch_proxy") else {}  # a proxy needs a list beside it
    assert reached(said(**needed)) != expected
    assert reached(said(**needed, **{name: text})) == expected


def test_a_setting_leaves_the_others_as_they_are() -> None:
    """The parts of a record that no variable is for keep the values of their layer."""
    config = fetching(said(fetch_allow_image="a.lan", fetch_allow_lora="b.lan", fetch_allow_webhook="c.lan"))
    rules: list[tuple[PurposeRules, PurposeRules]] = [
        (config.image, IMAGE_RULES),
        (config.lora, LORA_RULES),
        (config.webhook, WEBHOOK_RULES),
    ]
    assert [replace(found, allow=AllowList()) for found, _ in rules] == [default for _, default in rules]
    assert said(run_hosts="a.lan").address_settings() == AddressSettings(names=HostNames(run=("a.lan",)))


def test_a_key_is_lent_to_its_origins_and_to_nobody_without_one() -> None:
    lent = said(proxy_key="id:secret", proxy_origins="https://app.lan")
    assert api(lent).door.lending == Lending("id:secret", frozenset({"https://app.lan"}))
    assert api(said(proxy_origins="https://app.lan")).door.lending is None


# What cannot be.

BAD = [
    ("dtype", "float16", "use one of auto, bfloat16, float32"),
    ("memory_mode", "small", "use one of auto, resident"),
    ("precision", "int8", "use one of auto, full, fp8"),
    ("compile", "yes", "use one of auto, on, off"),
    ("attention", "fa2", "use one of auto, native"),
    ("kernels", "yes", "use one of auto, on, off"),
    ("max_area", "0", "pixels above 0"),
    ("prompt_cache_mib", "-1", "0 or above"),
    ("prompt_cache_mib", "1.5", "0 or above"),
    ("prompt_cache_mib", "9" * 30, "0 or above"),
    ("safety_threshold", "nan", "from 0 to 1"),
    ("safety_threshold", "80", "from 0 to 1"),
    ("safety_time_limit_s", "inf", "seconds above 0"),
    ("safety_time_limit_s", "0", "seconds above 0"),
    ("safety_forced", "maybe", "use 1 or 0"),
    ("log_level", "info", "use one of DEBUG"),
    ("port", "65536", "a port from 1 to 65535"),
    ("port", "http", "0 or above"),
    ("public_url", "box:8000", "use one like https://"),
    ("public_url", "https://box/?a=1", "use one like https://"),
    ("trusted_proxies", "10.0.0.1,proxy.lan", "use addresses, networks such as 10.0.0.0/8, or unix"),
    ("cors_origins", "app.lan", "use one like https://"),
    ("proxy_origins", "https://app.lan/", "use one like https://"),
    ("run_hosts", ",", "use one host name or more"),
    ("queue_hosts", "queue.lan:8000", "without a port"),
    ("files_hosts", "files lan", "Use host names such as fal.run"),
    ("max_images", "0", "above 0"),
    ("requests_per_minute", "0", "a number above 0"),
    ("offline", "2", "use 1 or 0"),
    ("fetch_allow_image", "10.0.0.0/8, a b", "no host, *.domain, address or CIDR"),
    ("fetch_ca_bundle", "/nowhere/ca.pem", "no such file; use one with certificates in PEM"),
    ("lora_roots", "loras", "no NAME=/absolute/folder"),
    ("lora_roots", "studio=/a,library=/b", "the name 'library' is taken; use another"),
    ("max_lora_scale", "-1", "a number above 0"),
    ("max_overtaken", "-1", "0 or above"),
    ("hub_url", "huggingface.co", "such as https://huggingface.co"),
    ("workers", "two", "0 or above"),
    ("max_queue_length", "0", "above 0"),
    ("files_kept_s", "-5", "seconds above 0"),
    ("webhook_retry_delays_s", "5,x", "seconds above 0"),
]


@pytest.mark.parametrize(("name", "text", "remedy"), BAD)
def test_a_value_that_cannot_be_is_refused_with_its_remedy(name: str, text: str, remedy: str) -> None:
    with pytest.raises(SettingError, match=re.escape(remedy)) as caught:
        said(**{name: text})
    assert str(caught.value).startswith(f"{variable(name)} is {text!r}: ")
    assert str(caught.value).count(".") >= 1
    assert not str(caught.value).endswith("..")


@pytest.mark.parametrize(
    ("name", "text", "remedy"),
    [
        ("database", "mysql://user:topsecret@host/db", "use sqlite:////path"),
        ("api_keys", "studio=id:topsecret,topsecret", "use NAME=KEY"),
        ("fetch_proxy_image", "ftp://user:topsecret@proxy.lan", "an address such as http://"),
        ("hub_token", "Bearer topsecret", "use a token as the hub gave it"),
    ],
)
def test_a_value_that_is_secret_is_refused_without_being_shown(name: str, text: str, remedy: str) -> None:
    with pytest.raises(SettingError, match=re.escape(remedy)) as caught:
        said(**{name: text})
    assert str(caught.value).startswith(f"{variable(name)} cannot be used: ")
    assert "topsecret" not in str(caught.value)


@pytest.mark.parametrize("url", ["sqlite:////srv/jobs.sqlite", "postgresql+psycopg://h/d", "postgres://h/d"])
def test_a_database_is_named_as_its_own_tools_name_it(url: str) -> None:
    assert said(database=url).database == url


def test_settings_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(ValueError, match="must be listed"):
        fetching(said(fetch_proxy_lora=PROXY))


def test_a_mistyped_variable_is_refused_and_the_right_one_named() -> None:
    with pytest.raises(SettingError, match=r"did you mean KONTEXTD_SAFETY_FORCED\?"):
        read_settings({"KONTEXTD_SAFTEY_FORCED": "1"})
    with pytest.raises(SettingError, match="see kontextd serve --help"):
        read_settings({"KONTEXTD_XYZZY": "1"})


# Options.


def test_an_option_goes_before_the_variable_of_the_same_name() -> None:
    read = read_settings({"KONTEXTD_PORT": "9000", "KONTEXTD_HOST": "::"}, {"port": "0"})
    assert (read.port, read.host) == (0, "::")


def test_a_mistake_names_the_option_where_it_came_from_one() -> None:
    with pytest.raises(SettingError, match=r"^--tls-cert is empty; give it a value, or leave it out\.$"):
        read_settings({}, {"tls_cert": " "})
    with pytest.raises(SettingError, match=r"^--public-url is 'box': "):
        read_settings({}, {"public_url": "box"})
    with pytest.raises(SettingError, match=r"^--database cannot be used: "):
        read_settings({}, {"database": "mysql://user:secret@host/db"})


# Documents.


def test_every_setting_is_described_by_one_line() -> None:
    lines = describe(*PARTS).splitlines()
    assert [line.split()[0] for line in lines] == [variable(name) for name in names_of(Settings)]
    assert all(re.fullmatch(r"  \w+ +\S.*", line) for line in lines)
    assert len({line.index(line.split(maxsplit=1)[1]) for line in lines}) == 1  # in one column
    assert describe(FetchSettings).splitlines() == [line for line in lines if line in describe(FetchSettings)]


def test_every_setting_is_in_the_documents_once_with_its_default() -> None:
    text = (DOCS / "cli.md").read_text(encoding="utf-8") + (DOCS / "operations.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(KONTEXTD_\w+)` \| (.*?) \| .+ \|$", text, re.M)
    assert sorted(name for name, _ in rows) == sorted(variable(name) for name in names_of(Settings))
    defaults = dict(rows)
    for name in names_of(Settings):
        default = getattr(Settings(), name)
        if default not in (None, ()):  # what stands for these is a phrase
            assert defaults[variable(name)].strip("`") == shown(default), name


def test_the_documents_name_no_setting_that_does_not_exist() -> None:
    known = {variable(name) for name in names_of(Settings)}
    for path in DOCS.glob("*.md"):
        named = re.findall(r"\bKONTEXTD_[A-Z0-9_]*[A-Z0-9]\b", path.read_text(encoding="utf-8"))
        assert set(named) - known == set(), path.name


def shown(default: object) -> str:
    if isinstance(default, tuple):
        return ",".join(map(shown, default))
    return f"{default:.15g}" if isinstance(default, bool | float) else str(default)
