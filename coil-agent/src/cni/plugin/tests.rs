#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

use super::*;

fn environment(command: &str) -> Environment {
    let pairs = [
        ("CNI_COMMAND", command),
        ("CNI_CONTAINERID", "c1"),
        ("CNI_NETNS", "/run/netns/a"),
        ("CNI_IFNAME", "eth0"),
        ("CNI_ARGS", "IgnoreUnknown=1;K8S_POD_NAMESPACE=demo;K8S_POD_NAME=a;X=y"),
    ];
    let variables = pairs.map(|(k, v)| (k.to_owned(), v.to_owned())).into();
    Environment { variables }
}

fn config(version: &str, extra: Value) -> Vec<u8> {
    let mut config = json!({"cniVersion": version, "name": "net", "type": "coil",
        "socket": "/nonexistent/coild.sock"});
    for (key, value) in extra.as_object().unwrap() {
        config[key] = value.clone();
    }
    config.to_string().into_bytes()
}

fn previous() -> Value {
    json!({"cniVersion": "0.4.0",
        "interfaces": [{"name": "veth1", "mac": "aa"}, {"name": "eth0", "sandbox": "/run/netns/a"}],
        "ips": [{"version": "4", "interface": 1, "address": "10.0.0.2/24", "gateway": "10.0.0.1"},
            {"version": "6", "address": "fd00::2/64"}],
        "routes": [{"dst": "0.0.0.0/0"}], "dns": {}, "vendor": {"x": 1}})
}

fn failure(environment: &Environment, input: &[u8]) -> PluginError {
    run(environment, input).0.unwrap_err()
}

#[test]
fn version_is_answered_alone() {
    let (answer, _) = run(&environment("VERSION"), br#"{"cniVersion":"0.4.0"}"#);
    let answer = answer.unwrap().unwrap();
    assert_eq!(answer["cniVersion"], "0.4.0");
    assert_eq!(answer["supportedVersions"], json!(["0.3.1", "0.4.0", "1.0.0", "1.1.0"]));
}

#[test]
fn mistakes_have_the_codes_of_the_specification() {
    let add = environment("ADD");
    let without = |key: &str| {
        let mut environment = environment("ADD");
        environment.variables.remove(key);
        environment
    };
    let with = |key: &str, value: &str| {
        let mut environment = environment("ADD");
        environment.variables.insert(key.into(), value.into());
        environment
    };
    let good = config("1.0.0", json!({}));
    for (environment, input, code) in [
        (&add, b"{".to_vec(), 6),
        (&add, b"[]".to_vec(), 7),
        (&add, config("9.9.9", json!({})), 1),
        (&add, config("1.0.0", json!({"name": ""})), 7),
        (&add, config("1.0.0", json!({"name": "a/b"})), 7),
        (&add, config("1.0.0", json!({"prevResult": 1})), 7),
        (&add, config("1.0.0", json!({"prevResult": {"ips": [{"address": "x"}]}})), 7),
        (&without("CNI_CONTAINERID"), good.clone(), 4),
        (&without("CNI_NETNS"), good.clone(), 4),
        (&without("CNI_IFNAME"), good.clone(), 4),
        (&with("CNI_IFNAME", "a/b"), good.clone(), 4),
        (&with("CNI_IFNAME", "a234567890123456"), good.clone(), 4),
        (&with("CNI_CONTAINERID", "../x"), good.clone(), 4),
        (&with("CNI_ARGS", "nonsense"), good.clone(), 4),
        (&environment_of("WHAT"), good.clone(), 4),
        (&environment_of("CHECK"), config("0.3.1", json!({})), 1),
        (&environment_of("CHECK"), config("1.0.0", json!({})), 7),
        (&environment_of("GC"), config("1.0.0", json!({})), 1),
        (&environment_of("STATUS"), config("1.0.0", json!({})), 1),
        (&environment_of("STATUS"), config("1.1.0", json!({})), 50),
        (&environment_of("GC"), config("1.1.0", json!({})), 7),
        (&environment_of("GC"), config("1.1.0", json!({"cni.dev/valid-attachments": 1})), 7),
        (&environment_of("GC"), config("1.1.0", json!({"cni.dev/valid-attachments": [{}]})), 7),
        (&with("CNI_NETNS", "/proc/self/ns/net"), good.clone(), 8),
        // coild is not running.
        (&environment_of("GC"), config("1.1.0", json!({"cni.dev/valid-attachments": []})), 11),
        (&environment_of("DEL"), good.clone(), 11),
        (&add, good.clone(), 11),
    ] {
        let error = failure(environment, &input);
        assert_eq!(error.code, code, "{error:?} for {}", String::from_utf8_lossy(&input));
    }
}

fn environment_of(command: &str) -> Environment {
    environment(command)
}

#[test]
fn errors_are_told_in_the_version_of_the_configuration() {
    let (answer, version) = run(&environment("ADD"), &config("0.4.0", json!({})));
    let text = answer.unwrap_err().to_json(version);
    assert_eq!(text["cniVersion"], "0.4.0");
    assert_eq!(text["code"], 11);
}

/// Frames of HTTP/2: the server's settings, and the beginning of an answer to the first request.
const SETTINGS: &[u8] = &[0, 0, 0, 4, 0, 0, 0, 0, 0];
const ANSWER: &[u8] = b"\x00\x00\x14\x01\x04\x00\x00\x00\x01\x88\x0f\x10\x10application/grpc";

/// The call fails wherever `coild` dies, and its runtime is told to try again.
#[test]
fn a_coild_that_is_killed_during_a_call_is_worth_another_attempt() {
    let socket = std::env::temp_dir().join(format!("coild-killed-{}.sock", std::process::id()));
    let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let config = config("1.0.0", json!({ "socket": socket }));
    // What it says, and how much it reads before it dies.
    let deaths: [(&[&[u8]], usize); 5] =
        [(&[], 0), (&[], 30), (&[SETTINGS], 30), (&[SETTINGS], 200), (&[SETTINGS, ANSWER], 200)];
    for (says, reads) in deaths {
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let (mut connection, _) = listener.accept().unwrap();
                let (before, after) = says.split_at(says.len().min(1));
                before.iter().for_each(|frame| connection.write_all(frame).unwrap());
                let mut heard = vec![0; reads];
                connection.read_exact(&mut heard).unwrap();
                after.iter().for_each(|frame| connection.write_all(frame).unwrap());
            });
            let failure = failure(&environment("ADD"), &config);
            assert_eq!(failure.code, 11, "after {says:?} and {reads} bytes: {failure:?}");
        });
    }
    std::fs::remove_file(&socket).unwrap();
}

/// That `coild` itself says something is unknown is another matter.
#[test]
fn what_coild_answers_without_a_detail_is_an_internal_error() {
    assert_eq!(PluginError::from(tonic::Status::unknown("no")).code, 999);
    assert_eq!(PluginError::from(tonic::Status::unavailable("no")).code, 11);
}

#[test]
fn a98_arguments_for_coild() {
    let input = config("0.4.0", json!({"prevResult": previous()}));
    let config = NetConf::parse(&input).unwrap();
    let args = arguments(&environment("ADD"), &config, &input, Call::Add).unwrap();
    assert_eq!(args.ips, ["10.0.0.2", "fd00::2"]);
    assert_eq!(args.interfaces, [("veth1".into(), false), ("eth0".into(), true)].into());
    assert_eq!(
        args.args,
        [
            ("K8S_POD_NAMESPACE".into(), "demo".into()),
            ("K8S_POD_NAME".into(), "a".into()),
            ("IS_CHAINED".into(), "true".into()),
        ]
        .into()
    );
}

#[test]
fn a_deleted_namespace_does_not_stop_del() {
    let mut environment = environment("DEL");
    environment.variables.remove("CNI_NETNS");
    let input = config("0.4.0", json!({}));
    let config = NetConf::parse(&input).unwrap();
    assert!(arguments(&environment, &config, &input, Call::Del).is_ok());
}

#[test]
fn results_are_passed_on_in_the_version_of_the_configuration() {
    let same = result::convert(&previous(), Version::V0_4_0).unwrap();
    assert_eq!(same, previous());
    let newer = result::convert(&previous(), Version::V1_0_0).unwrap();
    assert_eq!(newer["cniVersion"], "1.0.0");
    assert_eq!(newer["ips"][0], json!({"interface": 1, "address": "10.0.0.2/24", "gateway": "10.0.0.1"}));
    assert_eq!(newer["vendor"], json!({"x": 1}));
    let mut newest = newer.clone();
    newest["interfaces"][0]["mtu"] = json!(1400);
    let older = result::convert(&newest, Version::V0_3_1).unwrap();
    assert_eq!(older["ips"][0]["version"], "4");
    assert_eq!(older["ips"][1]["version"], "6");
    assert!(older["interfaces"][0].get("mtu").is_none());
    let kept = result::convert(&newest, Version::V1_1_0).unwrap();
    assert_eq!(kept["interfaces"][0]["mtu"], 1400);
}

#[test]
fn a98_unknown_arguments_are_ignored() {
    for text in ["", ";", "IgnoreUnknown=1", "IgnoreUnknown=0;X=y", "X=y;;Y="] {
        assert_eq!(pod_arguments(text).unwrap(), HashMap::new(), "{text:?}");
    }
    let args = pod_arguments("K8S_POD_NAME=a;K8S_POD_NAMESPACE=n=1;K8S_POD_INFRA_CONTAINER_ID=c").unwrap();
    assert_eq!((&*args["K8S_POD_NAME"], &*args["K8S_POD_NAMESPACE"]), ("a", "n=1"));
    assert_eq!(args["K8S_POD_INFRA_CONTAINER_ID"], "c");
    let error = pod_arguments("K8S_POD_NAME=a;nonsense").unwrap_err();
    assert_eq!((error.code, &*error.message), (4, "failed to load CNI_ARGS"));
}

#[test]
fn a99_configurations() {
    let parse = |text: Value| NetConf::parse(text.to_string().as_bytes());
    let plain = parse(json!({"cniVersion": "0.4.0", "name": "n"})).unwrap();
    assert_eq!((plain.version, &*plain.socket, plain.previous), (Version::V0_4_0, "/run/coild.sock", None));
    let empty = parse(json!({"cniVersion": "0.4.0", "name": "n", "socket": "", "prevResult": null})).unwrap();
    assert_eq!((&*empty.socket, empty.previous), ("/run/coild.sock", None));
    let full = json!({"cniVersion": "1.1.0", "name": "n", "socket": "/s", "prevResult": previous()});
    let full = parse(full).unwrap();
    assert_eq!((&*full.socket, full.previous), ("/s", Some(previous())));
}

#[test]
fn a_namespace_for_containers_of_runtimes_that_know_none() {
    let input = config("1.0.0", json!({"podNamespace": "containers"}));
    let config = NetConf::parse(&input).unwrap();
    let mut environment = environment("ADD");
    let mut namespace = |text: &str| {
        environment.variables.insert("CNI_ARGS".into(), text.into());
        arguments(&environment, &config, &input, Call::Add).unwrap().args["K8S_POD_NAMESPACE"].clone()
    };
    assert_eq!(namespace("K8S_POD_NAME=a"), "containers");
    assert_eq!(namespace("K8S_POD_NAMESPACE=;K8S_POD_NAME=a"), "containers");
    assert_eq!(namespace("K8S_POD_NAMESPACE=demo;K8S_POD_NAME=a"), "demo");
}
