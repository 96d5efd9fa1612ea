//! An explanation in plain words.

use super::{Explanation, Verdict};
use crate::inspect::output::seconds;

struct Text(String);

impl Text {
    fn line(&mut self, head: &str, text: &str) {
        self.0.push_str(&format!("{head:<12}{text}\n"));
    }
}

/// Renders it.
pub(super) fn render(e: &Explanation) -> String {
    let mut out = Text(String::new());
    let p = &e.packet;
    out.line(
        "Packet",
        &format!("{} {} -> {}, {} bytes, from pod {}", p.protocol, p.source, p.destination, p.bytes, e.pod),
    );
    policy(e, &mut out);
    if let Some(flow) = &e.flow {
        let age = flow.age.map(seconds).unwrap_or_default();
        let text = match (flow.existing, flow.decided_again) {
            (false, _) => "new".to_owned(),
            (true, false) => format!("exists for {age}, and keeps its gateway"),
            (true, true) => {
                format!("exists for {age}, and is decided again: its policy or its gateway has changed")
            }
        };
        out.line("Flow", &text);
    }
    if let Some(gateway) = &e.gateway {
        let pod = match &gateway.pod {
            Some(pod) => format!(" (pod {pod}, on this node)"),
            None => " (on another node)".to_owned(),
        };
        let chosen = match gateway.chosen_by {
            "existing flow" => "kept by the existing flow".to_owned(),
            "client address" => {
                format!(
                    "chosen by the pod's address (sessionAffinity: ClientIP) among {} ready",
                    gateway.ready
                )
            }
            _ => format!("chosen by the connection's hash among {} ready", gateway.ready),
        };
        out.line("Gateway", &format!("{}{pod}, {}, {chosen}", gateway.address, gateway.state));
    }
    if let Some(tunnel) = &e.tunnel {
        out.line(
            "Tunnel",
            &format!(
                "{} {} -> {}; packets up to {} bytes fit, the MSS of TCP is lowered to {}",
                if tunnel.kind == "fou" { "FOU" } else { "IP in IP" },
                tunnel.source,
                tunnel.destination,
                tunnel.mtu,
                tunnel.mss
            ),
        );
    }
    if e.tunnel.as_ref().is_some_and(|tunnel| tunnel.bypassed) {
        out.line("", "same node, not encapsulated: data goes from pod to pod once the flow is answered");
    }
    if let Some(translation) = &e.translation {
        let text = match &translation.seen_as {
            Some(seen) if translation.existing => format!("exists: the world sees {seen}"),
            Some(seen) => format!("new: the world would see {seen}"),
            None => "none".to_owned(),
        };
        out.line("Translation", &text);
    }
    if let Some(reply) = &e.reply {
        let text = match (reply.arrives, &reply.drop, reply.through_gateway) {
            (true, _, true) => "an answer would come back through the egress pod to the pod".to_owned(),
            (true, _, false) => "an answer from that egress pod would be let in to the pod".to_owned(),
            (false, Some(drop), _) => {
                format!(
                    "an answer would be dropped ({} at {}): {}",
                    drop.reason, drop.r#where, drop.description
                )
            }
            (false, None, _) => "an answer would not find its way back to the pod".to_owned(),
        };
        out.line("Answer", &text);
    }
    for (index, reason) in e.reasons.iter().enumerate() {
        out.line(if index == 0 { "Because" } else { "" }, reason);
    }
    if let Some(drop) = &e.drop {
        out.line("Reason", &format!("{} at {}: {}", drop.reason, drop.r#where, drop.description));
        if let Some(remedy) = drop.remedy {
            out.line("Remedy", remedy);
        }
    }
    let egress = e.egress.as_deref().unwrap_or("?");
    let verdict = match e.verdict {
        Verdict::Direct => "leaves directly, with the pod's own address".to_owned(),
        Verdict::Egress => match (&e.translation, &e.gateway) {
            (Some(translation), _) if translation.seen_as.is_some() => {
                format!(
                    "leaves through Egress {egress}, seen as {}",
                    translation.seen_as.as_deref().unwrap_or("?")
                )
            }
            (_, Some(gateway)) => format!("leaves through Egress {egress}, seen as {}", gateway.address),
            _ => format!("leaves through Egress {egress}"),
        },
        Verdict::Drop => "DROPPED".to_owned(),
        Verdict::TooBig => "DROPPED, too big for the tunnel; the pod is told".to_owned(),
    };
    out.line("Verdict", &verdict);
    out.0.truncate(out.0.trim_end().len());
    out.0
}

fn policy(e: &Explanation, out: &mut Text) {
    let Some(set) = e.policy.set else {
        out.line("Policy", "none");
        return;
    };
    let what = |rule: &super::Rule| match rule.action {
        "egress" => format!("{} goes through Egress {}", rule.prefix, rule.describe()),
        "block" => match &rule.egress {
            Some(egress) => format!("{} is dropped: Egress {egress} is deleted", rule.prefix),
            None => format!("{} is dropped", rule.prefix),
        },
        _ => format!("{} leaves directly", rule.prefix),
    };
    let text = match &e.policy.matched {
        None => format!("set {set}: no prefix contains the destination"),
        Some(rule) => format!("set {set}, longest prefix: {}", what(rule)),
    };
    out.line("Policy", &text);
    for other in &e.policy.others {
        out.line("", &format!("shorter, so without effect: {}", what(other)));
    }
}
