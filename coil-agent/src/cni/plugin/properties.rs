//! Whatever a runtime says is answered: no input makes the plugin panic, and every refusal has a code of
//! the specification.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

/// Codes of refusals that need no `coild`; 11 and 50 when it is not there.
const CODES: [u32; 8] = [1, 4, 5, 6, 7, 8, 11, 50];

fn environment() -> impl Strategy<Value = Environment> {
    let command = prop_oneof![
        4 => prop::sample::select(vec!["ADD", "DEL", "CHECK", "GC", "STATUS", "VERSION"]).prop_map(str::to_owned),
        1 => any::<String>(),
    ];
    let text = prop_oneof!["[a-z0-9]{1,20}", any::<String>(), Just(String::new())];
    let args = prop_oneof!["(K8S_POD_(NAME|NAMESPACE)=[a-z;=]{0,9};?){0,3}", any::<String>()];
    (command, text.clone(), text.clone(), text, args).prop_map(|(command, container, netns, ifname, args)| {
        let variables = [
            ("CNI_COMMAND", command),
            ("CNI_CONTAINERID", container),
            ("CNI_NETNS", netns),
            ("CNI_IFNAME", ifname),
            ("CNI_ARGS", args),
        ];
        Environment { variables: variables.map(|(key, value)| (key.to_owned(), value)).into() }
    })
}

/// JSON of any shape, with the keys that are read more often than chance would have them.
fn document() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<String>().prop_map(Value::from),
        prop::sample::select(vec!["0.3.1", "0.4.0", "1.0.0", "1.1.0", "10.0.0.1/24", "fd00::1/64", "net"])
            .prop_map(Value::from),
    ];
    let key = prop::sample::select(vec![
        "cniVersion",
        "name",
        "socket",
        "prevResult",
        "interfaces",
        "ips",
        "routes",
        "dns",
        "address",
        "sandbox",
        "mtu",
        "version",
        "cni.dev/valid-attachments",
        "containerID",
        "ifname",
        "x",
    ]);
    leaf.prop_recursive(4, 48, 6, move |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
            prop::collection::vec((key.clone(), inner), 0..8).prop_map(|pairs| {
                Value::Object(pairs.into_iter().map(|(key, value)| (key.to_owned(), value)).collect())
            }),
        ]
    })
}

/// A configuration that is one, but for what is put into it.
fn configuration() -> impl Strategy<Value = Value> {
    let version = prop::sample::select(vec!["0.3.1", "0.4.0", "1.0.0", "1.1.0"]);
    (version, prop::option::of(document()), prop::option::of(document())).prop_map(
        |(version, previous, list)| {
            let mut config =
                json!({"cniVersion": version, "name": "net", "socket": "/nonexistent/coild.sock"});
            if let Some(previous) = previous {
                config["prevResult"] = previous;
            }
            if let Some(list) = list {
                config["cni.dev/valid-attachments"] = list;
            }
            config
        },
    )
}

fn input() -> impl Strategy<Value = Vec<u8>> {
    let text = |value: Value| value.to_string().into_bytes();
    prop_oneof![
        prop::collection::vec(any::<u8>(), 0..64),
        document().prop_map(text),
        configuration().prop_map(text),
        // One that was cut off, and one with a byte that was not there.
        (configuration(), any::<prop::sample::Index>()).prop_map(move |(config, at)| {
            let mut input = text(config);
            input.truncate(at.index(input.len()));
            input
        }),
        (configuration(), any::<prop::sample::Index>(), any::<u8>()).prop_map(move |(config, at, byte)| {
            let mut input = text(config);
            let at = at.index(input.len());
            input[at] = byte;
            input
        }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4096, ..ProptestConfig::default() })]

    #[test]
    fn everything_is_answered(environment in environment(), input in input()) {
        let (answer, version) = run(&environment, &input);
        match answer {
            // Without coild only VERSION succeeds.
            Ok(answer) => {
                prop_assert_eq!(environment.get("CNI_COMMAND"), "VERSION");
                prop_assert!(answer.is_some());
            }
            Err(error) => {
                prop_assert!(CODES.contains(&error.code), "{:?}", error);
                prop_assert!(error.to_json(version)["msg"].is_string());
            }
        }
    }

    #[test]
    fn results_of_any_shape_are_converted_or_refused(result in document()) {
        for version in Version::ALL {
            if let Ok(converted) = result::convert(&result, version) {
                prop_assert_eq!(&converted["cniVersion"], version.as_str());
                // Once more changes nothing.
                prop_assert_eq!(result::convert(&converted, version), Ok(converted));
            }
        }
    }
}
