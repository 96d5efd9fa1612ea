//! Tests that do not apply to some kernels, and why.

/// A test that is left out on some kernels.
pub struct Exception {
    program: &'static str,
    /// Name, or part that names share.
    pub test: &'static str,
    /// First version that it applies to again.
    below: (u32, u32),
    /// Why.
    pub reason: &'static str,
}

/// Why tests do not apply that make or read tcx links.
const NO_TCX: &str = "the kernel has no tcx links";

const ALL: &[Exception] = &[
    privileged(
        "verifier::all_programs_load_within_the_budget",
        (5, 16),
        "the kernel does not say how many instructions its verifier went through",
    ),
    privileged("restart::a_link_of_an_interface_that_is_gone_is_not_taken_for_a_new_one", (6, 6), NO_TCX),
    privileged("attach::tcx_links_are_replaced_without_losing_a_packet", (6, 6), NO_TCX),
    privileged("attach::tcx_links_stay_links_with_an_agent_that_would_make_filters", (6, 6), NO_TCX),
    privileged("attach::filters_stay_filters_with_an_agent_that_would_make_tcx_links", (6, 6), NO_TCX),
    privileged(
        "attach::new_interfaces_are_attached_to_as_asked_for_and_old_ones_are_left_as_they_are_tcx",
        (6, 6),
        NO_TCX,
    ),
    privileged("others::tcx_links_beside_our_tcx_links", (6, 6), NO_TCX),
    privileged("others::filters_beside_our_tcx_links", (6, 6), NO_TCX),
    privileged("others::tcx_links_beside_our_filters", (6, 6), NO_TCX),
    privileged(
        "shortcut::tunnelled_packets_pass_the_stack_by",
        (5, 12),
        "the kernel does not say the MTU of a route, so that the short way is never taken",
    ),
    privileged(
        "tunnel::datagrams_that_nobody_cuts_are_counted",
        (5, 12),
        "veth devices take no datagrams in pieces, so that there are none that nobody has cut",
    ),
    privileged("merged::", (5, 13), "veth devices merge nothing without an XDP program"),
];

/// One of the privileged tests.
const fn privileged(test: &'static str, below: (u32, u32), reason: &'static str) -> Exception {
    Exception { program: "privileged", test, below, reason }
}

/// What does not apply to a kernel.
pub fn of(program: &str, version: (u32, u32)) -> impl Iterator<Item = &'static Exception> {
    ALL.iter().filter(move |exception| exception.program == program && version < exception.below)
}
