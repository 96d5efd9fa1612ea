//! The program `coil` as a container runtime runs it: environment and standard input in, standard output
//! and exit status out, checked against the schemas in `schemas/`, with a stand-in for `coild`.

#![allow(clippy::unwrap_used, clippy::panic, missing_docs, reason = "tests")]

mod coild;

use std::io::{ErrorKind, Write};
use std::path::Path;
use std::process::{Command, Output, Stdio};

use coil_agent::cni::error::Failure;
use coil_agent::cni::proto::{Attachment, ErrorCode};
use serde_json::{Value, json};

use self::coild::{Asked, Coild, Script};

const VERSIONS: [&str; 4] = ["0.3.1", "0.4.0", "1.0.0", "1.1.0"];

/// Runs the plugin as a runtime does.
fn run(command: &str, stdin: &[u8], extra: &[(&str, &str)]) -> Output {
    let mut process = Command::new(env!("CARGO_BIN_EXE_coil"));
    process
        .env_clear()
        .env("CNI_COMMAND", command)
        .env("CNI_CONTAINERID", "c1")
        .env("CNI_NETNS", "/run/netns/a")
        .env("CNI_IFNAME", "eth0")
        .env("CNI_ARGS", "IgnoreUnknown=1;K8S_POD_NAMESPACE=demo;K8S_POD_NAME=a;K8S_POD_UID=u")
        .env("CNI_PATH", "/opt/cni/bin")
        .envs(extra.iter().copied())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = process.spawn().unwrap();
    match child.stdin.take().unwrap().write_all(stdin) {
        // It may have seen enough.
        Err(error) if error.kind() != ErrorKind::BrokenPipe => panic!("{error}"),
        _ => {}
    }
    let output = child.wait_with_output().unwrap();
    assert!(output.status.code().is_some(), "killed: {output:?}");
    assert_eq!(output.stderr, b"", "nothing is said beside the result");
    output
}

fn config(version: &str, socket: &Path, extra: &Value) -> Vec<u8> {
    let mut config = json!({"cniVersion": version, "name": "net", "type": "coil", "socket": socket});
    for (key, value) in extra.as_object().unwrap() {
        config[key] = value.clone();
    }
    config.to_string().into_bytes()
}

/// Standard output of a run that succeeded.
fn succeeded(output: &Output) -> Value {
    assert!(output.status.success(), "{output:?}");
    if output.stdout.is_empty() { Value::Null } else { serde_json::from_slice(&output.stdout).unwrap() }
}

/// The error of a run that failed, and its code.
fn failed(output: &Output) -> (u64, Value) {
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let error: Value = serde_json::from_slice(&output.stdout).unwrap();
    valid("error", &error);
    (error["code"].as_u64().unwrap(), error)
}

/// Holds a document against a schema.
fn valid(schema: &str, document: &Value) {
    let problems = problems(schema, document);
    assert!(problems.is_empty(), "{schema}: {document:#}: {problems:#?}");
}

fn problems(schema: &str, document: &Value) -> Vec<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/cni/schemas/{schema}.json"));
    let schema: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let validator = jsonschema::validator_for(&schema).unwrap();
    validator.iter_errors(document).map(|error| error.to_string()).collect()
}

/// What `coild` answers in IPAM mode.
fn result_of_coild() -> Value {
    json!({
        "cniVersion": "1.1.0",
        "interfaces": [
            {"name": "eth0", "mac": "0a:58:0a:01:02:03", "sandbox": "/run/netns/a", "mtu": 1450},
            {"name": "veth01234567", "mac": "0a:58:0a:01:02:04", "mtu": 1450},
        ],
        "ips": [
            {"address": "10.2.0.0/32", "interface": 0},
            {"address": "fd02::200/128", "interface": 0},
        ],
        "dns": {},
    })
}

/// What a plugin before ours answered, in a version.
fn previous(version: &str) -> Value {
    let mut result = json!({
        "cniVersion": version,
        "interfaces": [
            {"name": "veth1", "mac": "0a:58:0a:01:02:05"},
            {"name": "eth0", "mac": "0a:58:0a:01:02:06", "sandbox": "/run/netns/a"},
        ],
        "ips": [{"interface": 1, "address": "10.0.0.2/24", "gateway": "10.0.0.1"}],
        "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0", "gw": "fd00::1"}],
        "dns": {"nameservers": ["10.96.0.10"], "search": ["cluster.local"]},
    });
    if version < "1.0.0" {
        result["ips"][0]["version"] = json!("4");
    }
    result
}

#[test]
fn add_answers_each_version_with_a_valid_result() {
    let result = result_of_coild().to_string().into_bytes();
    let coild = Coild::start(Script { result, ..Script::default() });
    for version in VERSIONS {
        let output = run("ADD", &config(version, &coild.socket, &json!({})), &[]);
        let result = succeeded(&output);
        valid(&format!("result-{version}"), &result);
        assert_eq!(result["ips"][1]["address"], "fd02::200/128");
        let chained = json!({"prevResult": previous(version)});
        let output = run("ADD", &config(version, &coild.socket, &chained), &[]);
        let result = succeeded(&output);
        valid(&format!("result-{version}"), &result);
        assert_eq!(result, previous(version), "a chained result passes unchanged");
    }
    // The schemas tell the versions apart.
    assert_ne!(problems("result-0.4.0", &previous("1.0.0")), Vec::<String>::new());
    assert_ne!(problems("result-1.0.0", &previous("0.4.0")), Vec::<String>::new());
    let mut newest = result_of_coild();
    newest["cniVersion"] = json!("1.0.0");
    assert_ne!(problems("result-1.0.0", &newest), Vec::<String>::new());
}

#[test]
fn coild_is_told_what_the_runtime_says() {
    let coild =
        Coild::start(Script { result: result_of_coild().to_string().into_bytes(), ..Script::default() });
    let input = config("1.0.0", &coild.socket, &json!({"prevResult": previous("1.0.0")}));
    for command in ["ADD", "CHECK", "DEL"] {
        succeeded(&run(command, &input, &[]));
        let asked = coild.asked();
        let [Asked::Container(asked, args)] = asked.as_slice() else { panic!("{asked:?}") };
        assert_eq!(*asked, command);
        assert_eq!((&*args.container_id, &*args.netns, &*args.ifname), ("c1", "/run/netns/a", "eth0"));
        assert_eq!((&args.path, &args.stdin_data), (&"/opt/cni/bin".to_owned(), &input));
        assert_eq!(args.ips, ["10.0.0.2"]);
        assert_eq!(args.interfaces, [("veth1".to_owned(), false), ("eth0".to_owned(), true)].into());
        assert_eq!(args.args["K8S_POD_NAME"], "a");
        assert_eq!(args.args["IS_CHAINED"], "true");
        assert!(!args.args.contains_key("K8S_POD_UID"));
    }
    // A container whose name space is gone, and whose last result makes no sense, is deleted all the same.
    let broken = config("1.0.0", &coild.socket, &json!({"prevResult": {"ips": [{"address": 1}]}}));
    succeeded(&run("DEL", &broken, &[("CNI_NETNS", "")]));
    assert_eq!(coild.asked().len(), 1);
}

#[test]
fn garbage_is_collected_and_status_told_in_the_newest_version() {
    let coild = Coild::start(Script::default());
    let list = json!({"cni.dev/valid-attachments": [{"containerID": "c1", "ifname": "eth0"}]});
    let input = config("1.1.0", &coild.socket, &list);
    // These are about no container.
    let none = [("CNI_CONTAINERID", ""), ("CNI_NETNS", ""), ("CNI_IFNAME", ""), ("CNI_ARGS", "")];
    assert_eq!(succeeded(&run("GC", &input, &none)), Value::Null);
    let asked = coild.asked();
    let [Asked::Gc(args)] = asked.as_slice() else { panic!("{asked:?}") };
    assert_eq!(args.valid_attachments, [Attachment { container_id: "c1".into(), ifname: "eth0".into() }]);
    let input = config("1.1.0", &coild.socket, &json!({}));
    assert_eq!(succeeded(&run("STATUS", &input, &none)), Value::Null);
    assert_eq!(coild.asked(), [Asked::Status]);
    // Without a list nothing is removed.
    assert_eq!(failed(&run("GC", &input, &none)).0, 7);
    assert_eq!(coild.asked(), []);

    for version in ["0.3.1", "0.4.0", "1.0.0"] {
        let input = config(version, &coild.socket, &list);
        for command in ["GC", "STATUS"] {
            assert_eq!(failed(&run(command, &input, &none)).0, 1, "{command} {version}");
        }
    }
    let old = Coild::start(Script { old: true, ..Script::default() });
    let input = config("1.1.0", &old.socket, &list);
    for command in ["GC", "STATUS"] {
        assert_eq!(succeeded(&run(command, &input, &none)), Value::Null, "{command}");
    }
}

#[test]
fn a97_failures_of_coild_arrive_with_code_message_and_details() {
    for code in [ErrorCode::TryAgainLater, ErrorCode::UnknownContainer, ErrorCode::Internal] {
        let failure = Some(Failure::new(code, "failed to allocate address", "out of blocks"));
        let coild = Coild::start(Script { failure, ..Script::default() });
        for version in VERSIONS {
            let output = run("ADD", &config(version, &coild.socket, &json!({})), &[]);
            let (got, error) = failed(&output);
            assert_eq!(i32::try_from(got).unwrap(), i32::from(code));
            assert_eq!(error["cniVersion"], version);
            assert_eq!(
                (&error["msg"], &error["details"]),
                (&json!("failed to allocate address"), &json!("out of blocks"))
            );
        }
    }
    let failure = Some(Failure::new(ErrorCode::LimitedConnectivity, "limited", "why"));
    let coild = Coild::start(Script { failure, ..Script::default() });
    assert_eq!(failed(&run("STATUS", &config("1.1.0", &coild.socket, &json!({})), &[])).0, 51);
    let coild = Coild::start(Script { failure: Some(Failure::retry("no", "why")), ..Script::default() });
    assert_eq!(failed(&run("STATUS", &config("1.1.0", &coild.socket, &json!({})), &[])).0, 50);
}

#[test]
fn without_coild_another_attempt_is_asked_for() {
    let gone = Path::new("/nonexistent/coild.sock");
    for command in ["ADD", "DEL"] {
        assert_eq!(failed(&run(command, &config("1.0.0", gone, &json!({})), &[])).0, 11, "{command}");
    }
    assert_eq!(failed(&run("STATUS", &config("1.1.0", gone, &json!({})), &[])).0, 50);
    // VERSION needs nobody.
    let answer = succeeded(&run("VERSION", br#"{"cniVersion": "1.0.0"}"#, &[]));
    valid("version", &answer);
    assert_eq!(answer["supportedVersions"], json!(VERSIONS));
}

#[test]
fn malformed_input_is_answered_with_an_error() {
    let gone = Path::new("/nonexistent/coild.sock");
    let good = config("1.0.0", gone, &json!({}));
    let long = format!(r#"{{"name": "{}"}}"#, "n".repeat(3 << 20)).into_bytes();
    let deep = [b"[".repeat(100_000), b"]".repeat(100_000)].concat();
    for (input, code) in [
        (&b""[..], 6),
        (b"\xff\xfe", 6),
        (&good[..good.len() - 1], 6),
        (&deep, 6),
        (&long, 6),
        (b"null", 7),
        (br#"{"cniVersion": 1}"#, 7),
        (br#"{"cniVersion": "1.0.0"}"#, 7),
        (br#"{"name": "n"}"#, 1),
        (br#"{"name": "n", "cniVersion": "0.2.0"}"#, 1),
    ] {
        let text = String::from_utf8_lossy(&input[..input.len().min(60)]).into_owned();
        assert_eq!(failed(&run("ADD", input, &[])).0, code, "{text}");
    }
    for (key, value) in [
        ("CNI_COMMAND", "ADDD"),
        ("CNI_CONTAINERID", ""),
        ("CNI_CONTAINERID", "a/../b"),
        ("CNI_IFNAME", "a name"),
        ("CNI_IFNAME", "sixteen-letters-"),
        ("CNI_NETNS", ""),
        ("CNI_ARGS", "K8S_POD_NAME"),
    ] {
        assert_eq!(failed(&run("ADD", &good, &[(key, value)])).0, 4, "{key}={value:?}");
    }
}
